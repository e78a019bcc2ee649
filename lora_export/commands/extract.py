"""lora-export extract: a LoRA out of a fully tuned model."""

from pathlib import Path
from typing import Any

import click

from lora_export.commands import merging_options, options
from lora_export.commands.talk import talking


@click.command("extract")
@options.base_option
@click.option("-m", "--tuned", required=True, metavar="TUNED", help="The tuned model: a folder or hub id.")
@options.output_option
@merging_options.rank_options
@click.option(
    "--rest",
    type=click.Choice(["save", "drop", "refuse"]),
    default="save",
    show_default=True,
    help="Changed norms, biases and other weights that are no matrices of a layer: save them whole with the "
    "adapter, leave them out, or stop.",
)
@options.force_option
@options.talk_options
def extract(
    base: str, tuned: str, output: Path, rank: int | None, energy: float | None, dtype: Any, rest: Any, force: bool,
    as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Take a LoRA out of a fully tuned model.

    The difference to the base, layer by layer, becomes B·A by its largest singular values; the error that this
    costs is told. One weight is in memory at a time. A model that was merged from an adapter gives it back at its
    rank.

    \b
        lora-export extract -b BASE -m TUNED -o ADAPTER --rank 32
        lora-export extract -b BASE -m TUNED -o ADAPTER --energy 95%
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.adapter_tools import extract as extract_adapter
        from lora_export.adapter_tools.saving import Rank
        from lora_export.checkpoint.sources import resolve
        from lora_export.commands.words import derived_words

        folders = resolve(base).folder, resolve(tuned).folder
        made = extract_adapter(*folders, output, Rank(rank, energy), rest, dtype, force, talk.progress)
        talk.result(made.as_json(), derived_words(made))
