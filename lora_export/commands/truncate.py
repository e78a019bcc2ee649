"""lora-export truncate: an adapter in a lower rank."""

from pathlib import Path
from typing import Any

from lora_export.commands import derive
from lora_export.commands.derive import Given
from lora_export.commands.talk import Talk
from lora_export.contracts.tool_options import RankOptions


@derive.command(
    "truncate",
    Given("-a", "--adapter", required=True, metavar="ADAPTER", help="Adapter: a folder or a Hub ID."),
    derive.OUTPUT,
    derive.options_of(RankOptions),
)
def truncate(talk: Talk, adapter: str, output: Path, **given: Any) -> None:
    """Write an adapter in a lower rank, each module in its own.

    Each module keeps the largest singular values of its own B·A; with --energy as many as it needs (rank_pattern).
    The error that this costs is exact, and reported. `lora-export inspect -a ADAPTER` shows what a rank would keep.

    \b
        lora-export truncate -a ADAPTER --energy 99% -o SMALLER
    """
    from lora_export import api
    from lora_export.commands.words import derived_words

    made = api.truncate(adapter, output, derive.build(RankOptions, given))
    talk.result(made.as_json(), derived_words(made))
