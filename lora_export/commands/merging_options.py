"""Options of how adapters are merged, combined and made smaller."""

from collections.abc import Callable
from typing import get_args

import click

from lora_export.choices import Combine, MajoritySign
from lora_export.commands.options import Command, stacked
from lora_export.commands.types import Share, Size
from lora_export.tasks import TASKS


def certify_option(command: Command) -> Command:
    return click.option(
        "--certify", type=click.Choice(["sampled", "full"]), default="sampled", show_default=True,
        help="Which rows of each tensor are computed again in float64 and compared: some, spread evenly, or all.",
    )(command)  # fmt: skip


def merge_options(command: Command) -> Command:
    return _weight_options(_arithmetic_options(combine_options(command)))


def _weight_options(command: Command) -> Command:
    """Which base, and what the merged weights are stored as."""
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
            "--task",
            type=click.Choice(list(TASKS)),
            default=None,
            help="Task of the merged model, where the adapter brings a head that the base does not have (a "
            "classifier, say) and does not tell what it is for.  [default: as the adapter says]",
        ),
        click.option(
            "--max-shard-size",
            type=Size(),
            default=None,
            help="Largest output file, such as 5GB.  [default: the base's own shards]",
        ),
    ]
    return stacked(decorators, command)


def _arithmetic_options(command: Command) -> Command:
    """Where and how it is computed, and what is asked of the numbers."""
    decorators: list[Callable[[Command], Command]] = [
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
    ]
    return stacked(decorators, command)


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

    return lambda command: stacked(decorators, command)


def rank_options(command: Command) -> Command:
    """How small a new adapter is."""
    decorators = [
        click.option("--rank", type=click.IntRange(min=1), default=None, help="Rank of every module."),
        click.option("--energy", type=Share(0.0, 1.0), default=None,
                     help="Of each module the least rank that keeps this share of ‖ΔW‖², as 95% or 0.95."),
        click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32",
                     show_default=True, help="Type of the new adapter's matrices."),
    ]  # fmt: skip
    return stacked(decorators, command)
