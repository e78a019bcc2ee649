"""lora-export extract: a LoRA out of a fully tuned model."""

from pathlib import Path
from typing import Any, Literal

import click

from lora_export.commands import derive
from lora_export.commands.derive import Given
from lora_export.commands.talk import Talk
from lora_export.contracts.tool_options import RankOptions


@derive.command(
    "extract",
    derive.BASE,
    Given("-m", "--tuned", required=True, metavar="TUNED", help="The tuned model: a folder or a Hub ID."),
    derive.OUTPUT,
    derive.options_of(RankOptions),
    Given("--rest", type=click.Choice(["save", "drop", "refuse"]), default="save", show_default=True,
          section=RankOptions.SECTION,
          help="Changed norms, biases and other weights that are not matrices of a layer: save them whole with the "
          "adapter, leave them out, or stop."),
)  # fmt: skip
def extract(
    talk: Talk, base: str, tuned: str, output: Path, rest: Literal["save", "drop", "refuse"], **given: Any
) -> None:
    """Take a LoRA out of a fully tuned model.

    The difference to the base, layer by layer, becomes B·A by its largest singular values; the error that this
    costs is reported. One weight is in memory at a time. A model that was merged from an adapter gives it back at
    its rank.

    \b
        lora-export extract -b BASE -m TUNED -o ADAPTER --rank 32
        lora-export extract -b BASE -m TUNED -o ADAPTER --energy 95%
    """
    from lora_export import api
    from lora_export.commands.words import derived_words

    rank = derive.build(RankOptions, given)
    made = api.extract(base, tuned, output, rank, rest=rest, progress=talk.progress)
    talk.result(made.as_json(), derived_words(made))
