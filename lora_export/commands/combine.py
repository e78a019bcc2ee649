"""lora-export combine: several adapters as one adapter."""

from pathlib import Path
from typing import Any, get_args

import click

from lora_export.choices import Combine
from lora_export.commands import derive
from lora_export.commands.derive import Given
from lora_export.commands.talk import Talk
from lora_export.contracts.options import COMBINING, MergeOptions
from lora_export.contracts.tool_options import RankOptions


@derive.command(
    "combine",
    derive.ADAPTERS,
    derive.OUTPUT,
    Given("--combine", type=click.Choice([m for m in get_args(Combine) if m != "none"]), default="linear",
          show_default=True, section=COMBINING, help="How the adapters become one, as for `lora-export merge`."),
    derive.options_of(MergeOptions, only=("combine_on", "density", "seed", "majority_sign")),
    derive.options_of(RankOptions),
)  # fmt: skip
def combine(talk: Talk, adapters: tuple[str, ...], output: Path, **given: Any) -> None:
    """Make one adapter of several, without a base.

    What they add to each weight is combined as `merge --combine` does, and written as a LoRA that PEFT and vLLM
    load. A sum of LoRAs is exact, and has the sum of their ranks; --rank or --energy make it smaller, and the
    error that this costs is reported. Other results (TIES, DARE, kinds other than LoRA) have no low rank of their
    own, and get the largest rank of the adapters. Kinds that need the base's weights (DoRA, OFT, IA3) can be
    combined by merge.

    \b
        lora-export combine -a A:0.7 -a B:0.3 -o BOTH --rank 16
    """
    from lora_export import api
    from lora_export.commands.words import derived_words

    rank = derive.build(RankOptions, given)
    made = api.combine(adapters, output, derive.build(MergeOptions, given, dtype="keep", force=False), rank)
    talk.result(made.as_json(), derived_words(made))
