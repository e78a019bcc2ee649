"""The report of a fleet again, from what lies in its root."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_export.commands.main import cli
from lora_export.contracts import (
    Record,
    Report,
    RowFigures,
)
from lora_export.fleet.stores.protocol import opened
from lora_export.report import fleet_document, fleet_story
from lora_export.storage.documents import decode
from lora_export.workflows.fleet import joined
from lora_export.workflows.fleet.row import figures_of
from tests.fleet.made_up import Made, finished, keep
from tests.report.conftest import full_report


@pytest.fixture
def root(made: Made, tmp_path: Path) -> Path:
    """A root with records of all rows that leave one, and no report."""
    store = opened(str(tmp_path / "root"))
    for outcome, plan in zip(made[0].rows, made[1], strict=True):
        if outcome.place:
            keep(store, outcome, plan, "2026-01-01T00:00:00+00:00")
    return tmp_path / "root"


def test_report_from_records_alone_has_every_row_that_left_one(made: Made, root: Path) -> None:
    run = CliRunner().invoke(cli, ["report", str(root), "--json"])
    assert run.exit_code == 0, run.output
    kept = {r.name: r for r in made[0].rows if r.place}
    document = fleet_document.load(opened(str(root)))
    assert document is not None and {r.name for r in document.rows} == set(kept)
    for row in document.rows:
        assert (row.key, row.state, row.seconds) == (
            kept[row.name].key,
            kept[row.name].state,
            kept[row.name].seconds,
        )
    assert json.loads(run.stdout)["totals"] == document.totals
    assert all((root / f"fleet.{end}").is_file() for end in ("html", "md", "prom"))


def test_report_of_a_store_without_renames_links_to_the_attempt_that_counts(made: Made, tmp_path: Path) -> None:
    store = opened("memory://attempts")
    outcome, plan = made[0].rows[0], made[1][0]
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "report" / "report.html").write_text("")
    store.publish(tmp_path / "run", outcome.place, Record(1, outcome.key, {}, outcome, {}))
    (row,) = joined.join(store).rows
    assert store.read(row.report) == b"" and row.report.startswith(f"{row.place}/report/")
    assert row.place.startswith(f"{outcome.place}/") and row.name == plan.row.name


def test_figures_of_a_failed_run_are_those_of_its_report() -> None:
    document = full_report()
    document["validate"]["checks"][0]["passed"] = False
    report = decode(document, Report, "the report", "report.json")
    assert report.validate is not None
    figures = figures_of(report)
    assert figures.checks == len(report.validate.checks) > 0 and figures.failed == 1
    assert figures.survival == min(s.share for s in report.validate.adapter_survival if s.share is not None)
    assert report.benchmark is not None and figures.verdict == report.benchmark.verdict
    assert figures_of(replace(report, merge=None, validate=None, benchmark=None)) == RowFigures()


def test_report_joins_shards_and_tells_of_missing_ones(made: Made, root: Path) -> None:
    store = opened(str(root))
    parts = [[o for o in made[0].rows if int(o.key, 16) % 3 == n] for n in range(3)]
    for n in (0, 2):
        fleet_document.write(replace(made[0], rows=tuple(parts[n])), made[1], store, shard=f"{n}/3")
    assert "shards/2-of-3/fleet.html" in set(store.names("shards"))
    assert "../../objects/" in (root / "shards/2-of-3/fleet.html").read_text(encoding="utf-8")
    found = joined.join(store)
    assert found.joined == ("0/3", "2/3")
    assert fleet_story.verdict(found) == ("1 of 3 shards left no report", "bad")
    assert {r.name for r in parts[1] if r.place} < {r.name for r in found.rows}  # their records are there
    fleet_document.write(replace(made[0], rows=tuple(parts[1])), made[1], store, shard="1/3")
    joined.report(str(root))
    whole = fleet_document.load(store)
    assert whole is not None and sorted(r.name for r in whole.rows) == sorted(r.name for r in made[0].rows)
    assert whole.totals == made[0].totals and {b.name: b.model for b in whole.bases}["smol"]
    before = (root / "fleet.json").read_bytes()
    joined.report(str(root))
    assert (root / "fleet.json").read_bytes() == before


def test_report_takes_records_that_are_newer_than_the_document(made: Made, root: Path) -> None:
    """A driver that was killed has left objects, and the document of the run before."""
    made = finished(made)
    store = opened(str(root))
    fleet_document.write(*made, store)
    outcome, plan = replace(made[0].rows[0], key="c" * 64, place=f"objects/{'c' * 64}"), made[1][0]
    keep(store, outcome, plan, "2999-01-01T00:00:00+00:00")
    keep(
        store,
        replace(outcome, name="new one", key="d" * 64, place=f"objects/{'d' * 64}"),
        plan,
        "2999-01-01T00:00:00",
    )
    keep(
        store,
        replace(outcome, name="old one", key="b" * 64, place=f"objects/{'b' * 64}"),
        plan,
        "1999-01-01T00:00:00",
    )
    found = {r.name: r for r in joined.join(store).rows}
    assert found[outcome.name].key == "c" * 64 and found[outcome.name].base == plan.row.base
    assert found["new one"].state == "done"
    assert "old one" not in found  # the last run did not ask for it


def test_report_tells_of_objects_that_are_gone_or_damaged(made: Made, root: Path) -> None:
    made = finished(made)
    store = opened(str(root))
    fleet_document.write(*made, store)
    gone, damaged = made[0].rows[0], made[0].rows[1]
    store.remove(gone.place)
    path = root / damaged.place / "record.json"
    path.write_bytes(path.read_bytes().replace(b'"attempts": 1', b'"attempts": 2'))
    found = {r.name: r for r in joined.join(store).rows}
    assert found[gone.name].state == "died" and "no longer" in fleet_story.reason(found[gone.name])
    assert found[damaged.name].state == "died" and "changed" in fleet_story.reason(found[damaged.name])


def test_inspect_says_what_a_root_holds_and_writes_nothing(made: Made, root: Path) -> None:
    before = sorted(root.rglob("*"))
    run = CliRunner().invoke(cli, ["inspect", str(root), "--json"])
    found = json.loads(run.stdout)
    assert found["kind"] == "fleet" and found["rows"] == sum(bool(r.place) for r in made[0].rows)
    assert (found["done"], found["gate"]) == (made[0].totals["done"], made[0].totals["gate"])
    assert sorted(root.rglob("*")) == before


def test_report_of_a_fleet_is_not_compared_with_a_run(root: Path) -> None:
    run = CliRunner().invoke(cli, ["report", str(root), "--compare", str(root)])
    assert run.exit_code == 1 and "not compared" in run.stderr


def test_report_of_an_empty_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    run = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert run.exit_code == 1 and "no fleet found" in run.stderr


@pytest.mark.parametrize(
    ("shard", "page"), [((), "/nightly/fleet.html"), (("--shard", "1/2"), "/nightly/shards/1-of-2/fleet.html")]
)
def test_fleet_command_names_the_report_that_was_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: tuple[str, ...], page: str
) -> None:
    monkeypatch.setattr("lora_export.api.fleet", lambda *given, **named: made[0])
    run = CliRunner().invoke(cli, ["fleet", "jobs.toml", "-o", str(tmp_path), *shard])
    assert run.exit_code == 1 and page in run.stdout
