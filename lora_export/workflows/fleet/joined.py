"""The report of a fleet again, from what lies in its root: documents of runs and shards, records, and names."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lora_export import records
from lora_export.contracts.fleet import Record
from lora_export.contracts.fleet_report import FLEET_SCHEMA_VERSION, FleetPages, FleetReport, FleetReportRow
from lora_export.errors import InputError
from lora_export.escape import without_secrets
from lora_export.fleet.stores.protocol import Store, opened
from lora_export.report import fleet_document, fleet_rows
from lora_export.version import __version__

_SHARD = re.compile(r"shards/(\d+)-of-(\d+)/fleet\.json")
_GONE = {
    "error": "InputError", "found": "its object is no longer in the root", "where": None, "tensor": None,
    "expected": None, "next": "run the fleet again, which makes it",
}  # fmt: skip


def report(root: str) -> FleetPages:
    """Write fleet.json and its pages from the records of a root, with what shards left. No jobs file is read.

    InputError for a root without any record or report; OutputError for a store that cannot be read or written.
    """
    store = opened(root)
    joined = join(store)
    fleet_document.publish(joined, store)
    where = without_secrets(store.where).rstrip("/")
    return FleetPages(
        html=f"{where}/{fleet_document.PAGE}",
        markdown=f"{where}/{fleet_document.SUMMARY}",
        metrics=f"{where}/{fleet_document.METRICS}",
        document=f"{where}/{fleet_document.DOCUMENT}",
        totals=joined.totals,
    )


def described(root: Path) -> dict[str, object]:
    """What `inspect` says of a root, from its records; nothing is written. InputError as for `report`."""
    found = join(opened(str(root)))
    return {
        "kind": "fleet",
        "created": found.created,
        "rows": len(found.rows),
        **{state: n for state, n in found.totals.items() if n},
        "bases": {base.name or "unknown": sum(base.totals.values()) for base in found.bases},
        "bytes": sum(row.nbytes or 0 for row in found.rows),
        "shards": list(found.joined),
        "written_by": found.tool_version,
    }


def join(store: Store) -> FleetReport:
    """What fleet.json has to say of a root.

    Rows are those of the last run, or of the shards of the last sharded one; a record that is newer than its row's
    document, or whose name no document has, takes its place: a driver that died has left records and no document.
    """
    current = fleet_document.load(store)
    documents = list(_current(store, current))
    kept = _Kept(store)
    if not documents and not kept.newest:
        raise InputError(
            "no fleet found", where=store.where, expected="a root with fleet.json, objects/ or failed/",
            next_step="lora-export fleet JOBS -o ROOT, which makes one",
        )  # fmt: skip
    rows = {row.name: kept.row(row, document.created) for document in documents for row in document.rows}
    for row in kept.others(rows, max((d.created for d in documents), default=""), _whole(documents)):
        rows[row.name] = row
    found = _report(list(rows.values()), documents, current, store)
    if current is not None and current.joined == found.joined and fleet_rows.same(found.rows, current.rows):
        return current
    return fleet_rows.with_changes(found, current)


def _report(
    rows: Sequence[FleetReportRow], documents: Sequence[FleetReport], current: FleetReport | None, store: Store
) -> FleetReport:
    models = {base.name: base.model for document in documents for base in document.bases}
    shards = tuple(document.shard for document in documents if document.shard)
    return FleetReport(
        schema_version=FLEET_SCHEMA_VERSION,
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        root=without_secrets(store.where),
        seconds=max((document.seconds for document in documents), default=0.0),
        totals=fleet_rows.totals(rows),
        bases=fleet_rows.bases(rows, models, (), (*documents, *((current,) if current else ())), store),
        rows=tuple(rows),
        joined=shards,
    )


# --- documents -----------------------------------------------------------------------------------------------


def _current(store: Store, whole: FleetReport | None) -> Iterator[FleetReport]:
    """The document of the last run, or those of the shards of the last sharded one, in their order."""
    shards: dict[int, list[FleetReport]] = {}
    for match in filter(None, map(_SHARD.fullmatch, store.names("shards"))):
        document = fleet_document.load(store, f"{match[1]}/{match[2]}")
        if document is not None:
            shards.setdefault(int(match[2]), []).append(document)
    newest = max(shards.values(), key=lambda of: max(d.created for d in of), default=[])
    of_a_run = whole is not None and not whole.joined
    if whole is not None and of_a_run and all(d.created < whole.created for d in newest):
        yield whole
    else:
        yield from sorted(newest, key=lambda d: int(d.shard.partition("/")[0]))


def _whole(documents: Sequence[FleetReport]) -> bool:
    """Whether the documents have all rows of their fleet."""
    if not documents:
        return False
    return not documents[0].shard or len(documents) == int(documents[0].shard.partition("/")[2])


# --- records -------------------------------------------------------------------------------------------------


class _Kept:
    """The records of a root: of objects, and of verdicts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_key: dict[str, tuple[str, Record | InputError]] = {}
        for place in ("failed", "objects"):  # an object is worth more than a verdict that stood before it
            for key, raw in store.records(place).items():
                self._by_key[key] = (place, _decoded(raw, f"{store.where}/{place}/{key}/{records.NAME}"))
        self.newest: dict[str, Record] = {}
        for _, record in self._by_key.values():
            if isinstance(record, Record):
                was = self.newest.get(record.outcome.name)
                if was is None or was.created < record.created:
                    self.newest[record.outcome.name] = record

    def row(self, row: FleetReportRow, created: str) -> FleetReportRow:
        """A row of a document, as the records have it."""
        newer = self.newest.get(row.name)
        if newer is not None and (newer.created > created or (newer.key == row.key and not row.place)):
            return fleet_rows.of_record(newer, row)
        place, record = self._by_key.get(row.key, ("", None))
        if isinstance(record, InputError):
            return replace(row, state="died", error=record.as_json())
        if record is None and row.place:
            return replace(row, state="died", error=_GONE)
        if row.state == "died" and place == "objects" and record is not None:  # it was gone, and is there again
            return fleet_rows.of_record(record, row)
        return row

    def others(self, known: Mapping[str, FleetReportRow], created: str, whole: bool) -> Iterator[FleetReportRow]:
        """Rows that no document has: of names, and of verdicts without one. whole: the documents have all rows of
        a run, so that only what is newer than they are belongs to the fleet."""
        names = {
            n: key for n, key in self._names(known) if (r := self._record(key)) and not self._old(r, created, whole)
        }
        for name, key in names.items():
            record = self._record(key)
            if record is not None:
                yield fleet_rows.of_record(record, FleetReportRow(name, "", (), "done", key))
        for name, record in self.newest.items():
            if name not in known and name not in names and not self._old(record, created, whole):
                yield fleet_rows.of_record(record, FleetReportRow(name, "", (), "done", record.key))

    @staticmethod
    def _old(record: Record, created: str, whole: bool) -> bool:
        return whole and record.created <= created

    def _record(self, key: str) -> Record | None:
        record = self._by_key.get(key, ("", None))[1]
        return record if isinstance(record, Record) else None

    def _names(self, known: Mapping[str, FleetReportRow]) -> Iterator[tuple[str, str]]:
        for path in self._store.names("names"):
            name = path.removeprefix("names/").removesuffix(".json")
            if name not in known and (raw := self._store.read(path)) is not None:
                try:
                    yield name, str(json.loads(raw)["key"])
                except (ValueError, KeyError, TypeError):
                    continue


def _decoded(raw: bytes, where: str) -> Record | InputError:
    try:
        return records.decoded(raw, where)
    except InputError as error:
        return error
