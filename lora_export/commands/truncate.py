"""lora-export truncate: an adapter in a lower rank."""

from pathlib import Path
from typing import Any

import click

from lora_export.commands import merging_options, options
from lora_export.commands.talk import talking


@click.command("truncate")
@click.option("-a", "--adapter", required=True, metavar="ADAPTER", help="Adapter: a folder or hub id.")
@options.output_option
@merging_options.rank_options
@options.force_option
@options.talk_options
def truncate(
    adapter: str, output: Path, rank: int | None, energy: float | None, dtype: Any, force: bool, as_json: bool,
    quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Write an adapter in a lower rank, each module in its own.

    Each module keeps the largest singular values of its own B·A; with --energy as many as it needs (rank_pattern).
    The error that this costs is exact, and told. `lora-export inspect -a ADAPTER` shows what a rank would keep.

    \b
        lora-export truncate -a ADAPTER --energy 99% -o SMALLER
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.adapter_tools import truncate as truncate_adapter
        from lora_export.adapter_tools.saving import Rank
        from lora_export.checkpoint.sources import resolve
        from lora_export.commands.words import derived_words

        made = truncate_adapter(resolve(adapter).folder, output, Rank(rank, energy), dtype, force)
        talk.result(made.as_json(), derived_words(made))
