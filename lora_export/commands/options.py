"""Options that several commands share, so that each is spelled and explained once."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args

import click

from lora_export.choices import MIN_SURVIVAL, Activations, Combine, ExtraArm, MajoritySign, Optimize, Precision

Command = Callable[..., Any]

FOLDER = click.Path(path_type=Path)


class Size(click.ParamType[int]):
    """A number of bytes, written as 5GB, 256MB or 2GiB."""

    name = "size"
    _UNITS: ClassVar = {
        "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
        "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        digits = text.rstrip("bgikmt")
        try:
            size = int(float(digits) * self._UNITS[text[len(digits) :].strip()])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is no size such as 5GB, 256MB or 2GiB", param, ctx)
        if size <= 0:
            self.fail("a size must be above 0", param, ctx)
        return size


class FiniteRange(click.FloatRange):
    """A number in a range, which NaN and infinity are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


def split_weight(text: str) -> tuple[str, float]:
    """ADAPTER or ADAPTER:WEIGHT; a colon that is followed by no number belongs to the name."""
    name, _, tail = text.rpartition(":")
    try:
        return (name, float(tail)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0


def base_option(command: Command) -> Command:
    return click.option(
        "-b", "--base", required=True, metavar="BASE",
        help="Base model: a folder, or a hub id such as owner/name@revision.",
    )(command)  # fmt: skip


def adapter_option(command: Command) -> Command:
    return click.option(
        "-a", "--adapter", "adapters", required=True, multiple=True, metavar="ADAPTER",
        help="Adapter: a folder or hub id. Repeat it to merge several, with weights as in -a A:0.7 -a B:0.3.",
    )(command)  # fmt: skip


def output_option(command: Command) -> Command:
    return click.option(
        "-o", "--output", required=True, type=FOLDER, metavar="OUT", help="Folder to write, all or nothing."
    )(command)


def certify_option(command: Command) -> Command:
    return click.option(
        "--certify", type=click.Choice(["sampled", "full"]), default="sampled", show_default=True,
        help="Which rows of each tensor are computed again in float64 and compared: some, spread evenly, or all.",
    )(command)  # fmt: skip


def merge_options(command: Command) -> Command:
    decorators: list[Callable[[Command], Command]] = [
        click.option(
            "--base-weights",
            type=click.Choice(["dequantized", "original"]),
            default="dequantized",
            show_default=True,
            help="Which base the adapter is merged into: the dequantized one, on which a QLoRA adapter was "
            "trained, or the original 16-bit one.",
        ),
        click.option(
            "--training-quantization",
            type=click.Choice(["none", "nf4", "fp4", "int8"]),
            default="none",
            show_default=True,
            help="How training quantized this 16-bit base on the fly (QLoRA). The adapter's own files do not tell.",
        ),
        click.option(
            "--training-double-quant",
            is_flag=True,
            help="Training used double quantization (bnb_4bit_use_double_quant=True).",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
            default="keep",
            show_default=True,
            help="Type of the merged weights; keep is the base's own.",
        ),
        click.option(
            "--max-shard-size",
            type=Size(),
            default=None,
            help="Largest output file, such as 5GB.  [default: the base's own shards]",
        ),
        click.option(
            "--max-memory",
            type=Size(),
            default="2GiB",
            show_default=True,
            help="Memory for the arithmetic of the merge, besides what Python and its libraries take; and, if "
            "given, for the weights that validation compares.  [validation's default: what the machine has]",
        ),
        click.option(
            "--device",
            type=click.Choice(["cpu", "cuda"]),
            default="cpu",
            show_default=True,
            help="Where the arithmetic of the merge is done, block by block.",
        ),
        certify_option,
        click.option(
            "--allow-nonfinite",
            is_flag=True,
            help="Take NaN and infinity (base, adapter, overflow) as they come; else they are refused.",
        ),
        click.option(
            "--expert-packing",
            type=click.Choice(["auto", "rank", "expert"]),
            default="auto",
            show_default=True,
            help="How the adapter packs B of fused experts: all experts of one rank together (PEFT), or all ranks "
            "of one expert (older Unsloth, Megatron-Bridge). auto: as the adapter says, else as PEFT does.",
        ),
        click.option(
            "--expert-layout",
            type=click.Choice(["auto", "out-in", "in-out"]),
            default="auto",
            show_default=True,
            help="How square weights of fused experts are stored; auto goes by the adapter's peft_version.",
        ),
        combine_options,
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def combine_options(command: Command) -> Command:
    rank = click.option(
        "--svd-rank", type=click.IntRange(min=1), default=None,
        help="Bring the combined delta of each weight to this rank.  [default for svd: the adapters' largest]",
    )  # fmt: skip
    return method_options("none")(rank(command))


def method_options(default: Combine) -> Callable[[Command], Command]:
    """How several adapters become one; where they must, `none` is no choice."""
    methods = [m for m in get_args(Combine) if m != "none" or default == "none"]
    in_turn = "none: each is applied to what the one before it left; " if default == "none" else ""
    decorators = [
        click.option("--combine", type=click.Choice(methods), default=default, show_default=True,
                     help=f"How several adapters become one change. {in_turn}linear, cat: the weighted sum of "
                     "their deltas; svd: that sum in a lower rank; ties, magnitude_prune: of each delta the "
                     "largest elements, with or without a vote about the sign; dare_linear, dare_ties: elements "
                     "chosen at random, made larger for those left out."),
        click.option("--combine-on", type=click.Choice(["deltas", "factors"]), default="deltas", show_default=True,
                     help="What is combined: the deltas, as in the papers, or A and B apart, as PEFT's methods of "
                     "these names do (LoRA of one rank)."),
        click.option("--density", type=click.FloatRange(0, 1, min_open=True), default=None,
                     help="ties, dare_…, magnitude_prune: the share of each delta that is kept."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                     help="dare_…: of the random choice."),
        click.option("--majority-sign", type=click.Choice(get_args(MajoritySign)), default="total",
                     show_default=True, help="ties, dare_ties: the vote counts sizes, or heads."),
    ]  # fmt: skip

    def decorated(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorated


def provider_option(command: Command) -> Command:
    return click.option(
        "--provider",
        type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
        default="auto",
        show_default=True,
        help="ONNX Runtime execution provider; auto takes CUDA if a session really runs on it, else the CPU.",
    )(command)


def export_options(command: Command) -> Command:
    decorators = [
        click.option("--precision", type=click.Choice(get_args(Precision)), default="fp32",
                     show_default=True, help="Precision of the ONNX weights."),
        click.option("--engine", type=click.Choice(["genai", "dynamo"]), default=None,
                     help="Export engine.  [default: the one that fits the architecture]"),
        click.option("--optimize", type=click.Choice(get_args(Optimize)), default="full", show_default=True,
                     help="What the dynamo engine does to its graph: nothing, simplify it, or fuse attention, "
                     "normalization and activation into ONNX Runtime's operators. The genai engine writes fused "
                     "graphs only."),
        click.option("--block-size", type=click.IntRange(min=1), default=None,
                     help="int4, int8, nf4: numbers that share a scale.  [default: 32, and 64 for nf4]"),
        click.option("--quantizer", type=click.Choice(["default", "rtn", "k_quant"]), default="default",
                     show_default=True, help="int4, int8: how the scale of a block is chosen. default: by the "
                     "largest number (MLAS); rtn: rounding to nearest; k_quant: searched, with zero points."),
        click.option("--accuracy-level", type=click.IntRange(0, 4), default=None,
                     help="int4, int8: type in which products are computed: 0 that of the inputs, 1 fp32, 2 fp16, "
                     "3 bf16, 4 int8.  [default: 4 on the CPU, 0 on CUDA]"),
        click.option("--keep", "keep", multiple=True, metavar="NODE|auto",
                     help="Nodes whose weights are not quantized, by name or pattern ('*down_proj*'); auto "
                     "(int4 of decoders): those whose int4 does the most measured damage for its size are int8. "
                     "Repeat it for more."),
        click.option("--activations", type=click.Choice(get_args(Activations)), default="float",
                     show_default=True, help="int8 of models that do not generate: what multiplies the weights. "
                     "dynamic: int8, its range found as the model runs; static: int8, its range fixed on texts. "
                     "Such graphs cannot be taken by --graph-from."),
        click.option("--calibration", type=click.Path(path_type=Path), default=None, metavar="FILE",
                     help="Static activations: texts in UTF-8, one a line, as the model will see.  "
                     "[default: a few built-in sentences]"),
    ]  # fmt: skip
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def graph_from_option(command: Command) -> Command:
    return click.option(
        "--graph-from", type=FOLDER, default=None, metavar="EXPORTED",
        help="An earlier export of the same base, with or without another adapter: take its graph and its options, "
        "and write only the weights.",
    )(command)  # fmt: skip


def shared_as_option(command: Command) -> Command:
    return click.option(
        "--shared-as", default=None, metavar="NAME",
        help="With --graph-from: write only NAME.onnx and the weights that differ from the base's into OUT, which "
        "is made with the base in it if it is not there.",
    )(command)  # fmt: skip


def merged_folder_option(command: Command) -> Command:
    return click.option(
        "--no-merged-folder", is_flag=True,
        help="Stream base and adapter straight into the ONNX files. Nothing else of the merged model is written: "
        "validation compares the ONNX graph alone, and the certificate lies in OUT.",
    )(command)  # fmt: skip


def bases_options(command: Command) -> Command:
    decorators = [
        click.option("--compare-bases", is_flag=True,
                     help="For a QLoRA adapter: measure on the text what merging into the dequantized and into "
                     "the original base gives, and advise which to ship."),
        click.option("--requantize", type=click.Choice(["nf4", "fp4", "int8"]), default=None,
                     help="With --compare-bases: also what putting the merged weights back into this format does."),
        click.option("--original-base", metavar="BASE", default=None,
                     help="With --compare-bases: the 16-bit model of which a 4- or 8-bit base was made."),
    ]  # fmt: skip
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def check_options(command: Command) -> Command:
    file = click.Path(path_type=Path)  # what is wrong with a file is told by who reads it
    decorators = [
        click.option("--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=None,
                     help="Text file with one prompt a line, in place of the built-in ones."),
        click.option("--text", type=file, default=None, metavar="FILE",
                     help="Running text in UTF-8 for the perplexities.  "
                     "[default: a page of Lincoln, Darwin and Austen]"),
        click.option("--rows", type=click.IntRange(min=1), default=64, show_default=True,
                     help="Rows of each updated tensor that are recomputed in float64 one by one; a large number "
                     "means all. Low-rank updates are always recomputed whole, and of others every element takes "
                     "part in random combinations."),
        click.option("--tolerance", type=FiniteRange(min=1), default=4.0, show_default=True, metavar="FACTOR",
                     help="How many times the noise floor outputs may differ. The arithmetic of each tensor has a "
                     "bound of its own, which this does not move."),
        click.option("--min-survival", type=click.FloatRange(0, 1), default=MIN_SURVIVAL, show_default=True,
                     help="Share of the adapter's effect on the outputs that an ONNX export keeps; 0 for any."),
    ]  # fmt: skip
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


GRIDS: dict[str, tuple[tuple[int, int], ...]] = {
    "quick": ((1, 128),),
    "standard": ((1, 128), (1, 1024), (8, 128), (8, 1024)),
    "paper": ((1, 128), (16, 256), (32, 512)),
}


def _grids() -> str:
    """Each grid in words: batch × tokens."""
    return "; ".join(f"{name}: {', '.join(f'{b}×{n}' for b, n in shapes)}" for name, shapes in GRIDS.items())


class Share(click.ParamType[float]):
    """A share within bounds, as 1% or 0.01."""

    name = "share"

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r} is no share; write 1% or 0.01.", param, ctx)
        if not self.least <= share <= self.most:
            self.fail(f"{value!r} is not between {self.least:.2%} and {self.most:.0%}.", param, ctx)
        return share


class Duration(click.ParamType[float]):
    """Seconds, at least one, as 90, 90s, 5m or 1h."""

    name = "duration"
    _UNITS: ClassVar = {"s": 1, "m": 60, "h": 3600}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        unit = self._UNITS.get(text[-1:], 0)
        try:
            seconds = float(text[:-1] if unit else text) * (unit or 1)
        except ValueError:
            self.fail(f"{value!r} is no time; write 90, 90s or 5m.", param, ctx)
        if not 1 <= seconds <= 7 * 24 * 3600:
            self.fail(f"{value!r} is not between a second and a week.", param, ctx)
        return seconds


def extra_arms_option(command: Command) -> Command:
    return click.option(
        "--arm", "extra_arms", type=click.Choice(get_args(ExtraArm)), multiple=True,
        help="Measure also: plugged, the adapter as ONNX Runtime plugs it into a graph with slots; pytorch, PEFT's "
        "unmerged model under PyTorch. Repeat it for both.",
    )(command)  # fmt: skip


def benchmark_options(command: Command) -> Command:
    decorators = [
        click.option("--grid", type=click.Choice(list(GRIDS)), default="quick", show_default=True,
                     help="Batch sizes and prompt lengths that are measured. " + _grids()),
        click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True,
                     help="Batch size, in place of a grid's; repeat for more."),
        click.option("--prompt-length", "lengths", type=click.IntRange(min=1), multiple=True,
                     help="Tokens in the prompt, in place of a grid's; repeat for more."),
        click.option("--margin", type=Share(0.0005, 0.5), default="1%", show_default=True, metavar="SHARE",
                     help="Largest relative difference in latency that still counts as none, as 1% or 0.01."),
        click.option("--max-time", "--max-seconds", "max_seconds", type=Duration(), default=None, metavar="TIME",
                     help="For the measurement, as 90, 90s or 5m; it ends sooner when the noise allows a verdict.  "
                     "[default: a minute for each batch size and prompt length; 20 s for each of --sessions]"),
        click.option("--sessions", type=click.IntRange(min=1, max=1000), default=1, show_default=True,
                     help="Open all sessions anew so many times, each time in another order, and take the interval "
                     "from their spread: for machines where two sessions of one graph differ. 6 are the least."),
    ]  # fmt: skip
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def rank_options(command: Command) -> Command:
    """How small a new adapter is."""
    decorators = [
        click.option("--rank", type=click.IntRange(min=1), default=None, help="Rank of every module."),
        click.option("--energy", type=Share(0.0, 1.0), default=None,
                     help="Of each module the least rank that keeps this share of ‖ΔW‖², as 95% or 0.95."),
        click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32",
                     show_default=True, help="Type of the new adapter's matrices."),
    ]  # fmt: skip
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def force_option(command: Command) -> Command:
    return click.option("--force", is_flag=True, help="Replace an output that exists.")(command)


def dry_run_option(command: Command) -> Command:
    return click.option("--dry-run", is_flag=True, help="Read headers, print the plan, write nothing.")(command)


def talk_options(command: Command) -> Command:
    decorators = [
        click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="Say warnings and errors only."),
        click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks of internal errors."),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command
