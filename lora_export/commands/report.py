"""lora-export report: HTML and Markdown again from report.json, or from the records of a fleet."""

from pathlib import Path

import click

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.talk import Talk, table


@derive.command(
    "report",
    click.Argument(["run"]),
    Given("--compare", type=FOLDER, help="Compare with this other run."),
    Given("-o", "--output", type=FOLDER, metavar="OUT", configurable="command line",
          default_text="RUN-vs-OTHER, next to RUN", help="With --compare: the folder for the pages."),
    derive.FORCE,
)  # fmt: skip
def report(talk: Talk, run: str, compare: Path | None, output: Path | None, force: bool) -> None:
    """Write report.html and report.md of RUN again from its report.json.

    With --compare, RUN stays as it is: the pages, with a table of both runs, are written into a new folder.

    RUN may be the ROOT of a fleet, a folder or a URL: fleet.json, fleet.html, fleet.md and fleet.prom are written
    again from its records, with what all shards left. The jobs file is not needed.
    """
    from lora_export import api
    from lora_export.contracts import FleetPages

    pages = api.report(run, compare, output, force=force)
    rows = [("html", str(pages.html)), ("markdown", str(pages.markdown))]
    if isinstance(pages, FleetPages):
        rows += [("metrics", pages.metrics), ("json", pages.document)]
        rows += [(state, f"{n:,}") for state, n in pages.totals.items() if n]
    talk.result(pages, table(rows))
