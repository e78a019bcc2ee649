"""lora-export report: HTML and Markdown again from report.json."""

from pathlib import Path

import click

from lora_export.commands import options
from lora_export.commands.talk import table, talking


@click.command("report")
@click.argument("run", type=options.FOLDER)
@click.option("--compare", type=options.FOLDER, default=None, help="Another run, to set beside this one.")
@options.talk_options
def report(run: Path, compare: Path | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Write report.html and report.md of RUN again from its report.json."""
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.report import render

        folder = _report_folder(run)
        render(folder, _report_folder(compare) if compare else None)
        files = {"html": str(folder / "report.html"), "markdown": str(folder / "report.md")}
        talk.result(files, table(list(files.items())))


def _report_folder(run: Path) -> Path:
    from lora_export.storage.sealed import refuse_outward_link

    inner = run / "report"
    if not inner.is_dir():
        return run
    refuse_outward_link(inner)
    return inner
