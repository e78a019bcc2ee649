"""fleet.json and the pages beside it: read, written, and left as they are where nothing changed."""

import json
from collections.abc import Sequence

from lora_export.contracts.fleet import KEPT, FleetResult, PlannedRow
from lora_export.contracts.fleet_report import FLEET_SCHEMA_VERSION, FleetReport
from lora_export.errors import InputError, LoraExportError
from lora_export.report import fleet_markdown, fleet_metrics, fleet_page, fleet_rows
from lora_export.report.fleet_rows import Place
from lora_export.storage.documents import as_json, decode, parse_json

DOCUMENT, PAGE, SUMMARY, METRICS = "fleet.json", "fleet.html", "fleet.md", "fleet.prom"


def write(
    result: FleetResult, planned: Sequence[PlannedRow], store: Place, *, shard: str | None = None
) -> FleetReport:
    """Write fleet.json, fleet.html, fleet.md and fleet.prom of a run, and return what fleet.json says.

    Nothing is written where no row was worked on and every row is as the run before left it. A shard's files lie
    below `folder_of(shard)`, so that shards do not write over each other; `lora-export report ROOT` joins them.
    """
    before = load(store, shard)
    report = fleet_rows.of_run(result, planned, store, before, shard)
    if before is not None and not _worked(result, planned) and fleet_rows.same(report.rows, before.rows):
        return before
    publish(report, store)
    return report


def _worked(result: FleetResult, planned: Sequence[PlannedRow]) -> bool:
    """Whether a worker took up a row. A verdict that stands is none."""
    standing = {p.row.name for p in planned if p.state in KEPT}
    return any(r.state != "skipped" and r.name not in standing for r in result.rows)


def publish(report: FleetReport, store: Place) -> None:
    """The document last: where it lies, its pages do."""
    folder = folder_of(report.shard)
    store.replace(folder + PAGE, fleet_page.html(report, "../" * folder.count("/")).encode())
    store.replace(folder + SUMMARY, fleet_markdown.markdown(report).encode())
    store.replace(folder + METRICS, fleet_metrics.metrics(report).encode())
    store.replace(folder + DOCUMENT, encoded(report))


def encoded(report: FleetReport) -> bytes:
    return (json.dumps(as_json(report), ensure_ascii=False, indent=1) + "\n").encode()


def folder_of(shard: str | None) -> str:
    """Where the report of a shard lies below the root, with a slash at its end; "" for all rows."""
    return f"shards/{shard.replace('/', '-of-')}/" if shard else ""


def load(store: Place, shard: str | None = None) -> FleetReport | None:
    """The document of the run before; None where there is none that this version reads, whatever lies there: the
    results of a night's work are not thrown away for it."""
    name = folder_of(shard) + DOCUMENT
    raw = store.read(name)
    if raw is None:
        return None
    try:
        return decoded(raw, f"{store.where}/{name}")
    except LoraExportError:
        return None


def decoded(raw: bytes, where: str) -> FleetReport:
    """fleet.json, read with distrust. InputError for one that is damaged or of another version."""
    try:
        document = parse_json(raw, len(raw))
    except ValueError as error:
        raise InputError(f"the report of a fleet is damaged: {error}", where=where) from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != FLEET_SCHEMA_VERSION:
        raise InputError(
            f"the report of a fleet has schema version {version!r}",
            where=where,
            expected=f"version {FLEET_SCHEMA_VERSION}, which this lora-export writes and reads",
            next_step="use the lora-export that wrote it, or run the fleet again",
        )
    return decode(document, FleetReport, "the report of a fleet", where)
