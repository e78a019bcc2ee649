"""lora-export combine: several adapters as one adapter."""

from typing import Any

import click

from lora_export.commands import merging_options, options
from lora_export.commands.talk import talking


@click.command("combine")
@options.adapter_option
@options.output_option
@merging_options.method_options("linear")
@merging_options.rank_options
@options.force_option
@options.talk_options
def combine(
    adapters: tuple[str, ...], output: Any, rank: int | None, energy: float | None, dtype: Any, force: bool,
    as_json: bool, quiet: bool, verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Make one adapter of several, without a base.

    What they add to each weight is combined as `merge --combine` does, and written as a LoRA that PEFT and vLLM
    load. A sum of LoRAs is exact, of the sum of their ranks; --rank or --energy make it smaller, and the error that
    this costs is told. Other results (TIES, DARE, kinds other than LoRA) have no low rank of their own, and get the
    largest of the adapters' ranks. Kinds that need the base's weights (DoRA, OFT, IA3) can be combined by merge.

    \b
        lora-export combine -a A:0.7 -a B:0.3 -o BOTH --rank 16
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.adapter_tools import combine as combine_adapters
        from lora_export.adapter_tools.saving import Rank
        from lora_export.commands import gather
        from lora_export.commands.words import derived_words
        from lora_export.contracts import MergeOptions

        choices = gather.chosen(adapters)
        made = combine_adapters(choices, output, MergeOptions(**words), Rank(rank, energy), dtype, force)
        talk.result(made.as_json(), derived_words(made))
