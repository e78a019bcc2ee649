"""lora-export report: HTML and Markdown again from report.json."""

from pathlib import Path

import click

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.talk import Talk, table


@derive.command(
    "report",
    click.Argument(["run"], type=FOLDER),
    Given("--compare", type=FOLDER, help="Another run, to set beside this one."),
)
def report(talk: Talk, run: Path, compare: Path | None) -> None:
    """Write report.html and report.md of RUN again from its report.json."""
    from lora_export import api

    files = api.report(run, compare)
    talk.result(files, table(list(files.items())))
