"""The files of a report: written, read back with distrust, and its pages drawn from them alone."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_export.contracts import Report, Samples
from lora_export.contracts.report import SCHEMA_VERSION
from lora_export.errors import InputError
from lora_export.report import pictures
from lora_export.report.comparison import comparison
from lora_export.report.markdown import markdown
from lora_export.report.page import html
from lora_export.storage.documents import as_json, decode
from lora_export.storage.files import output_file, output_folder
from lora_export.storage.sealed import read_json, write_json

REPORT, SAMPLES, CONDITIONS = "report.json", "samples.json", "conditions.json"
HTML, MARKDOWN = "report.html", "report.md"


def write(report: Report, folder: Path) -> None:
    """Write report.json and its pages into `folder`, and samples.json and conditions.json of a benchmark.

    NaN and infinity are written as words.
    """
    document = to_json(report)
    decode(document, Report, "the report", folder / REPORT)  # what nobody could read again is not written
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT, document)
    if report.benchmark is not None:
        write_json(folder / SAMPLES, as_json(report.benchmark.samples))
        write_json(folder / CONDITIONS, as_json(report.benchmark.conditions))
    render(folder)


def to_json(report: Report) -> dict[str, Any]:
    """What report.json holds: with the records of the merge, which --json of a merge leaves out."""
    document: dict[str, Any] = as_json(report)
    if report.merge is not None:
        document["merge"]["records"] = as_json(report.merge.records)
    return document


def load(folder: Path) -> Report:
    """report.json of a report folder. InputError if it is missing, damaged or of another version."""
    path = folder / REPORT
    if not path.is_file():
        raise InputError(
            "no report found",
            where=path,
            expected="a finished run, or its report folder",
            next_step="run lora-export merge-and-export, which writes one",
        )
    document = read_json(path)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"the report has schema version {version!r}",
            where=path,
            expected=f"version {SCHEMA_VERSION}, which this lora-export writes and reads",
            next_step="use the lora-export that wrote it, or run again",
        )
    return decode(document, Report, "the report", path)


def load_samples(folder: Path) -> Samples:
    """Raw latencies of a report folder; empty where there was no benchmark."""
    path = folder / SAMPLES
    return decode(read_json(path), Samples, "the file of samples", path) if path.is_file() else {}  # type: ignore[type-abstract]


def render(folder: Path) -> None:
    """Write report.html and report.md again from report.json.

    InputError as for `load`, and OutputError if a page is a link or a folder; nothing is written then.
    """
    report = load(folder)
    images = pictures.load(report, folder)
    pages = {HTML: html(report, load_samples(folder), images), MARKDOWN: markdown(report)}
    with contextlib.ExitStack() as written:
        for name, text in pages.items():
            work = written.enter_context(output_file(folder / name, force=True))
            (work / name).write_text(text, encoding="utf-8")


def compare(folder: Path, other: Path, output: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Write the pages of the report in `folder`, with a table that sets it beside the one in `other`, into the new
    folder `output`, which may not be in one of `inputs`. The reports stay as they are: a run's manifest seals them.
    """
    report, samples = load(folder), load_samples(folder)
    rows, images = comparison(report, load(other)), pictures.load(report, folder)
    with output_folder(output, force, inputs=[folder, other, *inputs]) as stage:
        (stage / HTML).write_text(html(report, samples, images, rows), encoding="utf-8")
        pictures.copy(images, folder, stage)
        (stage / MARKDOWN).write_text(markdown(report, rows), encoding="utf-8")
