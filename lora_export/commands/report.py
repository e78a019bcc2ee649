"""lora-export report: HTML and Markdown again from report.json."""

from pathlib import Path

import click

from lora_export.commands import options
from lora_export.commands.talk import table, talking


@click.command("report")
@click.argument("run", type=options.FOLDER)
@click.option("--compare", type=options.FOLDER, default=None, help="Compare with this other run.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="With --compare: the folder for the pages. Default: RUN-vs-OTHER, next to RUN.",
)
@options.force_option
@options.talk_options
def report(
    run: Path, compare: Path | None, output: Path | None, force: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Write report.html and report.md of RUN again from its report.json.

    With --compare, RUN stays as it is: the pages, with a table of both runs, are written into a new folder.
    """
    if output is not None and compare is None:
        raise click.UsageError("-o needs --compare")
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.workflows import run_report

        pages = run_report.compare(run, compare, output, force=force) if compare else run_report.render(run)
        talk.result(pages, table([("html", str(pages.html)), ("markdown", str(pages.markdown))]))
