"""fleet.json: what it says of a run, what changed since the one before, and when it is left alone."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from lora_export.contracts import (
    FleetReport,
    RowFigures,
)
from lora_export.errors import InputError
from lora_export.fleet.stores.protocol import opened
from lora_export.report import fleet_document, fleet_page, fleet_rows
from lora_export.storage.documents import decode, json_schema
from tests.fleet.made_up import FolderPlace, Made, again, finished, keep, renamed, with_row

NAN = math.nan


def test_document_is_read_back_as_it_was_written(made: Made, place: FolderPlace) -> None:
    made = with_row(made, 4, figures=RowFigures(survival=NAN, kl=math.inf, nbytes=7, checks=3, failed=1))
    report = fleet_document.write(*made, place)
    read = fleet_document.load(place)
    assert read is not None
    assert fleet_document.encoded(read) == (place.folder / "fleet.json").read_bytes()
    assert math.isnan(read.rows[4].survival or 0.0) and read.rows[4].kl == math.inf
    assert replace(read, rows=()) == replace(report, rows=())
    assert place.written == ["fleet.html", "fleet.md", "fleet.prom", "fleet.json"]  # where it is, its pages are


def test_document_counts_rows_by_state_and_base(made: Made, place: FolderPlace) -> None:
    report = fleet_document.write(*made, place)
    assert report.totals == made[0].totals and sum(report.totals.values()) == 24
    for base in report.bases:
        of_base = [r for r in report.rows if r.base == base.name]
        assert base.totals == {state: sum(r.state == state for r in of_base) for state in report.totals}
        assert base.model == next(p.row.model for p in made[1] if p.row.base == base.name)
    assert {p.key: p.rows for b in report.bases for p in b.preparations} == {
        key: sum(p.base_key == key for p in made[1]) for key in {p.base_key for p in made[1] if p.base_key}
    }


def test_rerun_of_finished_fleet_writes_nothing(made: Made, place: FolderPlace) -> None:
    made = finished(made)
    first = fleet_document.write(*made, place)
    place.written.clear()
    assert fleet_document.write(*again(made), place) == first
    assert place.written == []


WORKED: list[tuple[str, Callable[[Made], Made]]] = [
    ("a row was made", lambda m: with_row(m, 0, plan={"state": None}, state="done")),
    ("a row died", lambda m: with_row(m, 0, plan={"state": None}, state="died", attempts=3)),
    ("a row is gone", lambda m: (replace(m[0], rows=m[0].rows[1:]), m[1][1:])),
    ("another key is there", lambda m: with_row(m, 0, plan={"key": "f" * 64}, key="f" * 64)),
    ("another adapter has the name", lambda m: with_row(m, 0, plan={"row": renamed(m[1][0].row)})),
    ("a gate failed again", lambda m: with_row(m, 0, plan={"state": None}, state="gate")),
]


@pytest.mark.parametrize("change", [c for _, c in WORKED], ids=[name for name, _ in WORKED])
def test_rerun_that_changed_something_is_written(
    made: Made, place: FolderPlace, change: Callable[[Made], Made]
) -> None:
    made = finished(made)
    assert made[0].rows[0].state == "done"
    fleet_document.write(*made, place)
    place.written.clear()
    fleet_document.write(*change(again(made)), place)
    assert "fleet.json" in place.written


def test_skipped_row_keeps_figures_of_the_run_that_made_it(made: Made, place: FolderPlace) -> None:
    made = finished(made)
    first = fleet_document.write(*made, place)
    later = fleet_document.write(*with_row(again(made), 1, plan={"state": None}, state="done"), place)
    was, row = first.rows[0], later.rows[0]
    assert row.state == "skipped"
    assert replace(row, state=was.state) == was and was.seconds > 0 and was.survival is not None


@pytest.mark.parametrize("state", ["done", "gate"])
def test_row_that_stands_without_document_has_figures_of_its_record(made: Made, tmp_path: Path, state: str) -> None:
    store = opened(str(tmp_path / "root"))
    at = next(at for at, row in enumerate(made[0].rows) if row.state == state and made[1][at].base_key)
    outcome, plan = made[0].rows[at], made[1][at]
    keep(store, outcome, plan)
    (rows, plans) = again((replace(made[0], rows=(outcome,)), (plan,)))
    row = fleet_document.write(rows, plans, store).rows[0]
    assert (row.seconds, row.survival) == (outcome.seconds, outcome.figures.survival)
    assert (row.place, row.report, row.base_key) == (outcome.place, outcome.report, plan.base_key)
    assert row.state == ("skipped" if state == "done" else "gate") and row.made


def test_document_of_another_version_is_refused_by_its_version() -> None:
    with pytest.raises(InputError, match="schema version 2") as error:
        fleet_document.decoded(b'{"schema_version": 2}', "fleet.json")
    assert error.value.next_step is not None


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"schema_version": 2}', b"\xff", b'{"schema_version": 1}'])
def test_damaged_document_of_the_run_before_does_not_stop_a_report(
    made: Made, place: FolderPlace, content: bytes
) -> None:
    (place.folder / "fleet.json").write_bytes(content)
    assert fleet_document.write(*made, place).previous is None
    with pytest.raises(InputError):
        fleet_document.decoded(content, "fleet.json")


def test_secrets_of_adapters_and_root_are_in_no_file(made: Made, place: FolderPlace) -> None:
    row = replace(
        made[1][0].row, adapters=("s3://KEY:hunter2@bucket/a?token=hunter2",), model="https://u:hunter2@h/m"
    )
    made = with_row(made, 0, plan={"row": row})
    place.where = "s3://KEY:hunter2@fleets/nightly?secret=hunter2"
    report = fleet_document.write(*made, place)
    assert report.rows[0].adapters == ("s3://bucket/a",) and report.root == "s3://fleets/nightly"
    assert not any(b"hunter2" in (place.folder / name).read_bytes() for name in place.written)


def test_folders_are_named_without_their_path(made: Made, place: FolderPlace) -> None:
    row = replace(
        made[1][0].row, adapters=("/home/me/adapters/acme:0.5", "owner/b@v1"), base="mine", model="/models/mine"
    )
    report = fleet_document.write(*with_row(made, 0, plan={"row": row}), place)
    assert report.rows[0].adapters == ("acme:0.5", "owner/b@v1")
    assert "mine" in {base.model for base in report.bases} and b"/home/me" not in fleet_document.encoded(report)


def test_schema_agrees_with_reader(made: Made, place: FolderPlace) -> None:
    fleet_document.write(*made, place)
    fleet_document.write(*with_row(made, 0, state="died"), place)
    document = json.loads((place.folder / "fleet.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(json_schema(FleetReport))
    validator.validate(document)
    for breaking in ({"schema_version": 2}, {"rows": {}}, {"totals": {"done": "1"}}, {"changes": [{}]}):
        assert not validator.is_valid(document | breaking)
        with pytest.raises(InputError):
            decode(document | breaking, FleetReport, "the report", "fleet.json")


# --- what changed --------------------------------------------------------------------------------------------


def test_changes_name_what_is_different(made: Made, place: FolderPlace) -> None:
    made = finished(made)
    first = fleet_document.write(*made, place)
    there = [at for at, row in enumerate(made[0].rows) if row.state == "done" and at > 1]
    gone, moved, keyed = made[0].rows[0], made[0].rows[1], made[0].rows[there[0]]
    later = with_row(made, 1, figures=replace(moved.figures, survival=0.5))
    later = with_row(later, there[0], plan={"key": "e" * 64}, key="e" * 64, state="gate")
    new = replace(gone, name="a new one")
    plan = replace(made[1][0], row=replace(made[1][0].row, name="a new one"))
    report = fleet_document.write(replace(later[0], rows=(*later[0].rows[1:], new)), (*later[1][1:], plan), place)
    assert report.previous is not None and report.previous.totals == first.totals
    found = {(c.name, c.what): (c.before, c.after) for c in report.changes}
    assert found[(gone.name, "gone")] == ("done", "") and found[("a new one", "new")] == ("", "done")
    assert found[(keyed.name, "key")] == (keyed.key, "e" * 64)
    assert found[(keyed.name, "state")] == ("done", "gate")
    assert found[(moved.name, "survival")][1] == "0.5"
    assert len(found) == 5
    assert "50.00%" in fleet_page.html(report) and "a new one" in fleet_page.html(report)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (0.98, 0.98 + 0.004, False), (0.98, 0.98 - 0.006, True), (0.9, 0.95, True), (None, 0.9, False),
        (NAN, NAN, False), (NAN, 0.9, True), (0.9, NAN, True), (0.9, -math.inf, True),
    ],
)  # fmt: skip
def test_survival_has_moved_beyond_half_a_point(before: float | None, after: float | None, moved: bool) -> None:
    assert fleet_rows.moved(before, after) == moved
