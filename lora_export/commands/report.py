"""lora-export report: HTML and Markdown again from report.json."""

from pathlib import Path

import click

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.talk import Talk, table


@derive.command(
    "report",
    click.Argument(["run"], type=FOLDER),
    Given("--compare", type=FOLDER, help="Compare with this other run."),
    Given("-o", "--output", type=FOLDER, metavar="OUT", configurable="command line",
          help="With --compare: the folder for the pages. Default: RUN-vs-OTHER, next to RUN."),
    derive.FORCE,
)  # fmt: skip
def report(talk: Talk, run: Path, compare: Path | None, output: Path | None, force: bool) -> None:
    """Write report.html and report.md of RUN again from its report.json.

    With --compare, RUN stays as it is: the pages, with a table of both runs, are written into a new folder.
    """
    from lora_export import api

    pages = api.report(run, compare, output, force=force)
    talk.result(pages, table([("html", str(pages.html)), ("markdown", str(pages.markdown))]))
