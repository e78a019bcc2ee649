"""The rows of fleet.json: made of a run's outcomes, and compared with those of the run before."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Protocol

from lora_export import records
from lora_export.contracts.fleet import KEPT, STATES, FleetResult, PlannedRow, Record, RowOutcome
from lora_export.contracts.fleet_report import (
    FLEET_SCHEMA_VERSION,
    FleetChange,
    FleetPreparation,
    FleetReport,
    FleetReportBase,
    FleetReportBefore,
    FleetReportRow,
)
from lora_export.errors import InputError
from lora_export.escape import without_secrets
from lora_export.version import __version__

SURVIVAL_MOVED = 0.005  # of the adapter's effect: half a percentage point


class Place(Protocol):
    """What the report needs of a store. Names are relative, with slashes."""

    where: str

    def read(self, name: str) -> bytes | None: ...

    def replace(self, name: str, content: bytes) -> None: ...

    def records(self, place: str) -> Mapping[str, bytes]: ...


# --- of a run ------------------------------------------------------------------------------------------------


def of_run(
    result: FleetResult,
    planned: Sequence[PlannedRow],
    store: Place,
    before: FleetReport | None,
    shard: str | None = None,
) -> FleetReport:
    """What fleet.json says of a run. A row that was there already has the figures of the run that made it: from the
    document of the run before, from its outcome, or from its record."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    plans = {p.row.name: p for p in planned}
    old = {row.name: row for row in before.rows} if before is not None else {}
    rows = [_row(outcome, plans[outcome.name], old.get(outcome.name), created) for outcome in result.rows]
    rows = _with_records(rows, store)
    models = {p.row.base: named(p.row.model) for p in plans.values()}
    return with_changes(
        FleetReport(
            schema_version=FLEET_SCHEMA_VERSION,
            tool_version=__version__,
            created=created,
            root=without_secrets(store.where),
            seconds=result.seconds,
            totals=totals(rows),
            bases=bases(rows, models, result.bases, (before,) if before else (), store),
            rows=tuple(rows),
            shard=shard or "",
        ),
        before,
    )


def _row(outcome: RowOutcome, plan: PlannedRow, was: FleetReportRow | None, created: str) -> FleetReportRow:
    """A plan says of a row that stands neither the base's key nor why it is alone: nothing is looked up for it."""
    stands = plan.state is not None or outcome.state == "skipped"
    key = outcome.key or plan.key
    if stands and was is not None and was.key == key and settled(was.state) == settled(outcome.state):
        row = replace(was, state=outcome.state)
    else:
        row = from_outcome(outcome, "" if stands else created)
    return replace(
        row, base=plan.row.base, adapters=tuple(map(named, plan.row.adapters)), key=key,
        base_key=plan.base_key or row.base_key, alone=plan.alone or row.alone,
        error=plan.error or outcome.error or row.error,
    )  # fmt: skip


def named(given: str) -> str:
    """An adapter or a base as documents name it: a URL without secrets, a Hub ID, or a folder without its
    path, which is of one machine."""
    return without_secrets(given) if "://" in given or not given.startswith(("/", "~")) else PurePath(given).name


def from_outcome(outcome: RowOutcome, made: str) -> FleetReportRow:
    """A row of what a worker left, which knows neither the base's name nor the adapter as it was given."""
    figures = outcome.figures
    return FleetReportRow(
        name=outcome.name, base="", adapters=(), state=outcome.state, key=outcome.key, place=outcome.place,
        report=outcome.report, seconds=outcome.seconds, attempts=outcome.attempts, stages=outcome.stages,
        memory_bytes=outcome.memory_bytes, survival=figures.survival, delta_survival=figures.delta_survival,
        kl=figures.kl, ratio=figures.ratio, verdict=figures.verdict, nbytes=figures.nbytes, checks=figures.checks,
        failed=figures.failed, error=outcome.error, warnings=outcome.warnings, made=made,
    )  # fmt: skip


def _with_records(rows: Sequence[FleetReportRow], store: Place) -> list[FleetReportRow]:
    """Rows that need no work, with figures from their records where no document has them: it is gone, or a row of
    another name was made. objects/ and failed/ are read once, if there is such a row."""
    kept: dict[str, Mapping[str, bytes]] = {}
    found = []
    for row in rows:
        place = "objects" if row.state == "skipped" else "failed"
        if not row.place and row.key and row.state in ("skipped", *KEPT):
            if place not in kept:
                kept[place] = store.records(place)
            record = read_record(kept[place][row.key]) if row.key in kept[place] else None
            row = of_record(record, row) if record is not None else row
        found.append(row)
    return found


def of_record(record: Record, row: FleetReportRow) -> FleetReportRow:
    """The row with what a record says; which name it is, and what it was asked for, the record does not know."""
    made = from_outcome(record.outcome, record.created)
    if record.at:  # of a store without renames: which attempt counts, its record alone knows
        place = f"{made.place}/{record.at}"
        made = replace(made, place=place, report=made.report.replace(made.place, place, 1))
    return replace(
        made, name=row.name, base=row.base, adapters=row.adapters, key=record.key,
        state=row.state if settled(row.state) == made.state else made.state,
        base_key=record.base_key or row.base_key, alone=row.alone,
    )  # fmt: skip


def read_record(raw: bytes) -> Record | None:
    """record.json; None for one that cannot be read, which `verify` tells of."""
    try:
        return records.decoded(raw, records.NAME)
    except InputError:
        return None


# --- totals and bases ----------------------------------------------------------------------------------------


def totals(rows: Iterable[FleetReportRow]) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(STATES, 0)
    for row in rows:
        counts[row.state] += 1
    return counts


def bases(
    rows: Sequence[FleetReportRow],
    models: Mapping[str, str],
    prepared: Sequence[RowOutcome],
    earlier: Sequence[FleetReport],
    store: Place,
) -> tuple[FleetReportBase, ...]:
    """By the name of a base its totals, and what its rows share: of this run, else of the first earlier one that
    has it, else of the store."""
    by_base: dict[str, list[FleetReportRow]] = {}
    for row in rows:
        by_base.setdefault(row.base, []).append(row)
    fresh = {outcome.key: outcome for outcome in prepared}
    old = {p.key: p for report in reversed(earlier) for base in report.bases for p in base.preparations}
    return tuple(
        FleetReportBase(
            name=name,
            model=models.get(name, ""),
            totals=totals(of_base),
            preparations=tuple(
                _preparation(key, sum(r.base_key == key for r in of_base), fresh.get(key), old.get(key), store)
                for key in dict.fromkeys(r.base_key for r in of_base if r.base_key)
            ),
        )
        for name, of_base in by_base.items()
    )


def _preparation(
    key: str, rows: int, outcome: RowOutcome | None, was: FleetPreparation | None, store: Place
) -> FleetPreparation:
    if was is not None and was.claim and (outcome is None or outcome.state == "skipped"):
        return replace(was, rows=rows)
    raw = store.read(f"bases/{key}/record.json")
    record = read_record(raw) if raw is not None else None
    if outcome is None or (outcome.state == "skipped" and record is not None):
        outcome = record.outcome if record is not None else RowOutcome(key, key, "skipped", "base")
    return FleetPreparation(
        key=key, state=outcome.state, rows=rows, seconds=outcome.seconds, stages=outcome.stages,
        place=outcome.place or f"bases/{key}", claim=record.claim if record is not None else "",
        error=outcome.error,
    )  # fmt: skip


# --- what changed --------------------------------------------------------------------------------------------


def settled(state: str) -> str:
    """An object that was made and one that was there already are the same."""
    return "done" if state == "skipped" else state


def same(rows: Sequence[FleetReportRow], before: Sequence[FleetReportRow]) -> bool:
    """Whether nothing has to be told of the rows that the run before did not tell."""
    return len(rows) == len(before) and all(
        replace(row, state=was.state) == was and settled(row.state) == settled(was.state)
        for row, was in zip(rows, before, strict=True)
    )


def with_changes(report: FleetReport, before: FleetReport | None) -> FleetReport:
    """The same report with what is different from the one before."""
    if before is None:
        return report
    previous = FleetReportBefore(before.created, before.tool_version, before.totals)
    return replace(report, previous=previous, changes=tuple(changes(before.rows, report.rows)))


def changes(before: Sequence[FleetReportRow], after: Sequence[FleetReportRow]) -> list[FleetChange]:
    """Differences by name, in the order of the jobs file, rows that are gone first."""
    old, new = {r.name: r for r in before}, {r.name: r for r in after}
    found = [FleetChange(name, "gone", before=row.state) for name, row in old.items() if name not in new]
    for name, row in new.items():
        was = old.get(name)
        if was is None:
            found.append(FleetChange(name, "new", after=row.state))
            continue
        if was.key != row.key:
            found.append(FleetChange(name, "key", was.key, row.key))
        if settled(was.state) != settled(row.state):
            found.append(FleetChange(name, "state", was.state, row.state))
        if moved(was.survival, row.survival):
            found.append(FleetChange(name, "survival", f"{was.survival:.6g}", f"{row.survival:.6g}"))
    return found


def moved(before: float | None, after: float | None) -> bool:
    """Whether another share of the adapter's effect is kept. One that is no number has moved from one that is."""
    if before is None or after is None:
        return False
    if math.isnan(before) or math.isnan(after):
        return math.isnan(before) != math.isnan(after)
    return not abs(after - before) <= SURVIVAL_MOVED
