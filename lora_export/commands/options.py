"""Options that several commands share, so that each is spelled and explained once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from lora_export.choices import MIN_SURVIVAL, Activations, ExtraArm, Optimize, Precision
from lora_export.commands.lazy_choice import LazyChoice
from lora_export.commands.types import Duration, FiniteRange, Share
from lora_export.registered import engine_names

Command = Callable[..., Any]

FOLDER = click.Path(path_type=Path)


def stacked(decorators: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """The command with options in the order in which they are listed."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


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


def adapter_or_none_option(command: Command) -> Command:
    return click.option(
        "-a", "--adapter", "adapters", multiple=True, metavar="ADAPTER",
        help="Adapter: a folder or hub id. Repeat it to merge several, with weights as in -a A:0.7 -a B:0.3. "
        "Without one a quantized base is only dequantized.",
    )(command)  # fmt: skip


def output_option(command: Command) -> Command:
    return click.option(
        "-o", "--output", required=True, type=FOLDER, metavar="OUT", help="Folder to write, all or nothing."
    )(command)


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
        click.option("--engine", type=LazyChoice(engine_names), default=None,
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
    return stacked(decorators, command)


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
    return stacked(decorators, command)


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
                     "means all. Low-rank updates and fused experts are always recomputed whole, and of others "
                     "every element takes part in random combinations."),
        click.option("--tolerance", type=FiniteRange(min=1), default=4.0, show_default=True, metavar="FACTOR",
                     help="How many times the noise floor outputs may differ. The arithmetic of each tensor has a "
                     "bound of its own, which this does not move."),
        click.option("--validation-seed", type=click.IntRange(min=0, max=2**31 - 1), default=None, metavar="NUMBER",
                     help="Seed of the lengths, inputs and rows that validation draws, to repeat a run.  [default: "
                     "another one at each run; the result states it]"),
        click.option("--min-survival", type=click.FloatRange(0, 1), default=MIN_SURVIVAL, show_default=True,
                     help="Share of the adapter's effect on the outputs that an ONNX export keeps; 0 for any."),
    ]  # fmt: skip
    return stacked(decorators, command)


GRIDS: dict[str, tuple[tuple[int, int], ...]] = {
    "quick": ((1, 128),),
    "standard": ((1, 128), (1, 1024), (8, 128), (8, 1024)),
    "paper": ((1, 128), (16, 256), (32, 512)),
}


def _grids() -> str:
    """Each grid in words: batch × tokens."""
    return "; ".join(f"{name}: {', '.join(f'{b}×{n}' for b, n in shapes)}" for name, shapes in GRIDS.items())


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
    return stacked(decorators, command)


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
    return stacked(decorators, command)
