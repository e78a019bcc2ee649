"""fleet.html: one file that loads nothing; its script is the one of this package, by its hash."""

import hashlib
from base64 import b64encode
from pathlib import Path

from lora_export.contracts.fleet_report import FleetReport, FleetReportRow
from lora_export.escape import one_line
from lora_export.report import fleet_story as story
from lora_export.report.page import rendered

_TEMPLATES = Path(__file__).parent / "templates"


def html(report: FleetReport, up: str = "") -> str:
    """The whole page; the template escapes every string. up: from the page's folder to the root, for links."""
    from markupsafe import Markup

    script = (_TEMPLATES / "fleet.js").read_text(encoding="utf-8")
    return rendered(
        "fleet.html.j2",
        report=report,
        story=story,
        plots=[(Markup(svg), caption) for svg, caption in story.plots(report)],
        style=Markup((_TEMPLATES / "fleet.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        link=lambda row: link(row, up),
        title=_title(report),
    )


def _title(report: FleetReport) -> str:
    return one_line(report.root).rstrip("/").rpartition("/")[2] or one_line(report.root)


def link(row: FleetReportRow, up: str) -> str | None:
    """Where the row's own report lies, relative to the page; None where there is none, or where the name could lead
    out of the root or be read as an address."""
    parts = row.report.split("/")
    if not row.report or any(part in ("", ".", "..") for part in parts) or not row.report.isprintable():
        return None
    from urllib.parse import quote

    return up + quote(row.report)
