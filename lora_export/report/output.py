"""Write a report, or write its pages again from its JSON."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.report.compare import compare
from lora_export.report.markdown import markdown
from lora_export.report.page import html
from lora_export.report.schema import (
    CONDITIONS,
    HTML,
    MARKDOWN,
    REPORT,
    SAMPLES,
    check,
    load,
    load_samples,
)
from lora_export.storage.documents import finite
from lora_export.storage.files import output_file
from lora_export.storage.sealed import write_json


def write(
    report: Mapping[str, Any],
    folder: Path,
    samples: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    conditions: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write report.json, samples.json (cell → arm → milliseconds), conditions.json (cell → a reading of the machine
    for each block), report.html and report.md into `folder`.

    NaN and infinity are written as words. Raises InputError if the report does not keep to its own schema.
    """
    clean = finite(report)
    check(clean, folder / REPORT)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT, clean)
    if samples is not None:
        write_json(folder / SAMPLES, samples)
    if conditions is not None:
        write_json(folder / CONDITIONS, conditions)
    render(folder)


def render(folder: Path, compare_with: Path | None = None) -> None:
    """Write report.html and report.md again from report.json, set beside another report folder if given.

    Raises InputError if either report is missing, damaged or of another schema version, and OutputError if a page
    is a link or a folder; nothing is written then.
    """
    report, samples = load(folder), load_samples(folder)
    rows = compare(report, load(compare_with)) if compare_with else []
    pages = {HTML: html(report, samples, rows), MARKDOWN: markdown(report, rows)}
    with contextlib.ExitStack() as written:
        for name, text in pages.items():
            work = written.enter_context(output_file(folder / name, force=True))
            (work / name).write_text(text, encoding="utf-8")
