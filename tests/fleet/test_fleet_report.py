"""fleet.json, its pages and metrics: what they say, what no name can make of them, and when they are left alone."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from lora_export.commands.main import cli
from lora_export.contracts import FleetReport, FleetResult, FleetRow, PlannedRow, Record, RowFigures, RowOutcome
from lora_export.errors import InputError
from lora_export.fleet import records
from lora_export.fleet.stores.protocol import opened
from lora_export.report import fleet_document, fleet_metrics, fleet_page, fleet_rows, fleet_story
from lora_export.report.fleet_plots import Point, histogram
from lora_export.storage.documents import decode, json_schema
from lora_export.workflows.fleet import joined
from tests.fleet.made_up import FolderPlace, fleet
from tests.report.test_report_pages import HOSTILE, Page


class FleetPage(Page):
    VOID = (*Page.VOID, "input")


Made = tuple[FleetResult, tuple[PlannedRow, ...]]
NAN = math.nan


@pytest.fixture
def made() -> Made:
    return fleet(24, seed=10, weights=(80, 5, 5, 5, 5))


@pytest.fixture
def place(tmp_path: Path) -> FolderPlace:
    return FolderPlace(tmp_path)


def with_row(made: Made, at: int, *, plan: dict[str, Any] | None = None, **changed: Any) -> Made:
    """The same fleet with one other outcome."""
    rows, planned = list(made[0].rows), list(made[1])
    rows[at] = replace(rows[at], **changed)
    planned[at] = replace(planned[at], **(plan or {}))
    return replace(made[0], rows=tuple(rows)), tuple(planned)


def again(made: Made) -> Made:
    """The outcomes and the plan of a run that finds all of it there."""
    rows, planned = [], []
    for outcome, plan in zip(*(made[0].rows, made[1]), strict=True):
        state = "skipped" if outcome.state == "done" else outcome.state
        stands = state in ("skipped", "gate", "refused")
        rows.append(RowOutcome(outcome.name, outcome.key, state, error=outcome.error))
        told = {"state": state, "base_key": "", "alone": "", "error": outcome.error} if stands else {}
        planned.append(replace(plan, **told))  # type: ignore[arg-type]
    return FleetResult(made[0].root, tuple(rows)), tuple(planned)


def renamed(row: FleetRow) -> FleetRow:
    return replace(row, adapters=("elsewhere/the-same-files",))


def finished(made: Made) -> Made:
    """Without rows that are tried in every run."""
    keep = [at for at, row in enumerate(made[0].rows) if row.state not in ("died", "timeout")]
    return replace(made[0], rows=tuple(made[0].rows[k] for k in keep)), tuple(made[1][k] for k in keep)


# --- the document --------------------------------------------------------------------------------------------


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


# --- pages ---------------------------------------------------------------------------------------------------


def written(made: Made, place: FolderPlace) -> tuple[FleetReport, FleetPage, str, str]:
    report = fleet_document.write(*made, place)
    html, text, prom = ((place.folder / f"fleet.{e}").read_text(encoding="utf-8") for e in ("html", "md", "prom"))
    page = FleetPage(html)
    assert page.open == []
    return report, page, text, prom


def test_page_shows_every_row_and_only_its_own_script(made: Made, place: FolderPlace) -> None:
    report, page, text, _ = written(made, place)
    for row in report.rows:
        assert row.name in page.words
    assert page.tags.count("script") == 1
    links = [value for tag, name, value in page.attributes if name in ("href", "src", "action", "style")]
    assert all(re.fullmatch(r"(objects|failed)/[0-9a-f]{64}/report/report\.html", link) for link in links)
    policy = next(v for tag, name, v in page.attributes if name == "content" and "default-src" in v)
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.partition("script-src")[2]
    assert page.words.index("not there") < page.words.index("Why") < page.words.index("Survival")
    assert "not there" in text and text.count("| ---") > 3


def test_page_script_is_the_one_that_its_policy_allows(made: Made, place: FolderPlace) -> None:
    import base64
    import hashlib

    fleet_document.write(*made, place)
    html = (place.folder / "fleet.html").read_text(encoding="utf-8")
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in html or f"script-src 'sha256-{digest}'" in html
    assert len(script) > 1000


NAMES = [HOSTILE, '=HYPERLINK("http://x")', "ש\u202eמ\u2066abc", "n" * 3000, "javascript:alert(1)", 'a\\b"c\nd']


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_pages_hostile_names_stay_text(made: Made, place: FolderPlace, name: str) -> None:
    row = replace(made[1][0].row, name=name, base=name, model=name, adapters=(name,))
    error = {"found": name, "where": name, "tensor": name, "next": name}
    made = with_row(
        made, 0, plan={"row": row, "alone": name, "key": name}, name=name, key=name, state="refused", error=error,
        report=name, place=name, stages={name: 1.0}, warnings=(name,),
    )  # fmt: skip
    _, page, text, prom = written(made, place)
    assert page.tags.count("script") == 1 and page.tags.count("img") == 0
    assert not any(attribute.startswith("on") for _, attribute, _ in page.attributes)
    assert not any("\u202e" in part or "\u2066" in part or "\x1b" in part for part in page.text)
    assert "<script" not in text and "<img" not in text and "\u202e" not in text
    links = [value for _, attribute, value in page.attributes if attribute == "href"]
    assert all("://" not in link and not link.startswith(("javascript:", "/")) for link in links)
    samples(prom)


@pytest.mark.parametrize("report", ["", "../x.html", "/etc/passwd", "a/../../b.html", "a//b", "a/\u202eb"])
def test_page_links_stay_in_the_root(made: Made, place: FolderPlace, report: str) -> None:
    row = fleet_document.write(*made, place).rows[0]
    assert fleet_page.link(replace(row, report=report), "") is None
    assert fleet_page.link(replace(row, report="objects/a b/x.html"), "../../") == "../../objects/a%20b/x.html"


def test_worst_rows_come_first_and_what_is_no_number_before_them(made: Made, place: FolderPlace) -> None:
    made = with_row(made, 9, figures=RowFigures(survival=NAN, kl=NAN))
    report = fleet_document.write(*made, place)
    low, far = fleet_story.worst_survival(report.rows), fleet_story.worst_kl(report.rows)
    assert len(low) == len(far) == 10
    assert low[0].name == far[0].name == report.rows[9].name
    known = sorted(r.survival for r in report.rows if r.survival is not None and not math.isnan(r.survival))
    assert [r.survival for r in low[1:]] == known[:9]
    assert [r.kl for r in far[1:]] == sorted((r.kl for r in report.rows if r.kl == r.kl and r.kl), reverse=True)[:9]
    order = [r.state for r in fleet_story.not_there(report.rows)]
    assert order == sorted(order, key=("died", "timeout", "refused", "gate").index)
    assert "not a number" in fleet_page.html(report)


def test_stages_sum_up_rows_and_what_they_share(made: Made, place: FolderPlace) -> None:
    report = fleet_document.write(*made, place)
    rows = {r[0]: r for r in fleet_story.stage_rows(report)}
    assert rows["validate"][1] == str(sum("validate" in r.stages for r in report.rows))
    assert rows["reference (base)"][3] == "240.0 s" or rows["reference (base)"][3] == "4 min 00 s"
    assert sum(float(r[4].rstrip("%")) for r in rows.values()) == pytest.approx(100, abs=0.5)


def test_claims_say_what_was_measured_in_the_words_of_the_record(made: Made, tmp_path: Path) -> None:
    store = opened(str(tmp_path / "root"))
    shared = made[0].bases[0]
    claim = "measured once for this graph, with acme, on 2026-01-01; no row's graph is another file"
    record = Record(1, shared.key, {}, shared, {}, claim=claim)
    store.create(f"bases/{shared.key}/record.json", records.encoded(records.finished(record, {})))
    report = fleet_document.write(*made, store)
    assert any(claim in text for _, text in fleet_story.claims(report))
    assert claim in FleetPage(fleet_page.html(report)).words
    alone = next(p.alone for p in made[1] if p.alone)
    assert any(alone in text for _, text in fleet_story.claims(report))


# --- distributions -------------------------------------------------------------------------------------------


def bars(svg: str) -> int:
    return sum(int(n.replace(",", "")) for n in re.findall(r"<title>([\d,]+)(?: not there)?:", svg))


def test_histogram_counts_every_figure_once() -> None:
    values = [0.0, 0.001, 0.5, 3.0, 1000.0, NAN, None, math.inf, 1e300]
    svg = histogram([Point(v, at == 2) for at, v in enumerate(values)], 'a "label" <b>', "{:g}".format)
    assert svg is not None and bars(svg) == 5 and "NaN" not in svg and "nan" not in svg
    assert svg.count("var(--bad)") == 1 and "<b>" not in svg


@pytest.mark.parametrize("values", [[], [1.0], [NAN, math.inf, None, 1.0, 2.0, 3.0, 4.0]])
def test_histogram_of_few_figures_is_none(values: list[float | None]) -> None:
    assert histogram([Point(v) for v in values], "", str) is None


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [-1.0, 5.0], [1e-9, 1e8], [5e-324, 1.0], [-1e9, 1e9]])
def test_histogram_of_any_range_has_ticks(values: list[float]) -> None:
    svg = histogram([Point(v) for v in (*values, *values, *values)], "", "{:g}".format)
    assert svg is not None and bars(svg) == 6
    assert 1 <= svg.count('text-anchor="middle"') <= 14


# --- metrics -------------------------------------------------------------------------------------------------

_SAMPLE = re.compile(r'([a-z_:][a-z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)+)\})? (\S+)')


def samples(text: str) -> dict[tuple[str, str], float]:
    """The samples of the text format: one HELP and TYPE before all lines of a metric, no line twice."""
    found: dict[tuple[str, str], float] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds and kind in ("gauge", "histogram")
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            match = _SAMPLE.fullmatch(line)
            assert match, line
            name = list(kinds)[-1]
            assert match[1] == name or (kinds[name] == "histogram" and match[1].removeprefix(name) in (
                "_bucket", "_sum", "_count"))  # fmt: skip
            assert (match[1], match[2] or "") not in found
            found[match[1], match[2] or ""] = float(match[3])
    return found


def test_metrics_have_counts_sums_and_cumulative_buckets(made: Made, place: FolderPlace) -> None:
    report, _, _, prom = written(made, place)
    read = samples(prom)
    for base in report.bases:
        for state, n in base.totals.items():
            assert read["lora_export_fleet_rows", f'base="{base.name}",state="{state}"'] == n
        rows = [r for r in report.rows if r.base == base.name]
        label = f'base="{base.name}"'
        timed = [r.seconds for r in rows if r.place]
        assert read["lora_export_fleet_row_duration_seconds_count", label] == len(timed)
        assert read["lora_export_fleet_row_duration_seconds_sum", label] == pytest.approx(sum(timed))
        counts = [v for (n, of), v in read.items() if n.endswith("_bucket") and label in of]
        assert counts == sorted(counts) and counts[-1] == len(timed) and counts[0] < counts[-1]
        assert read["lora_export_fleet_object_bytes", label] == sum(r.nbytes or 0 for r in rows)
        least = min(r.survival for r in rows if r.survival is not None)
        assert read["lora_export_fleet_survival_ratio", f'{label},quantile="0"'] == least
    assert read["lora_export_fleet_last_run_timestamp_seconds", ""] > 1.7e9


def test_metrics_of_a_figure_that_is_no_number_are_nan(made: Made, place: FolderPlace) -> None:
    made = with_row(made, 0, figures=RowFigures(survival=NAN))
    report, _, _, prom = written(made, place)
    value = samples(prom)["lora_export_fleet_survival_ratio", f'base="{report.rows[0].base}",quantile="0"']
    assert math.isnan(value)


def test_metrics_escape_labels(made: Made, place: FolderPlace) -> None:
    report = fleet_document.write(*made, place)
    text = fleet_metrics.metrics(replace(report, root='a\\b"c\nd'))
    assert 'root="a\\\\b\\"c\\nd"' in text
    samples(text)


# --- from what lies in the root ------------------------------------------------------------------------------


def keep(store: Any, outcome: RowOutcome, plan: PlannedRow, created: str = "") -> None:
    """What a worker leaves of a row: record and name."""
    record = Record(1, outcome.key, {}, outcome, {}, base_key=plan.base_key, created=created)
    store.create(f"{outcome.place}/record.json", records.encoded(records.finished(record, {})))
    if outcome.state == "done":
        named = json.dumps({"key": outcome.key, "place": outcome.place}).encode()
        store.replace(f"names/{outcome.name}.json", named)


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


def test_report_of_a_fleet_is_not_compared_with_a_run(root: Path) -> None:
    run = CliRunner().invoke(cli, ["report", str(root), "--compare", str(root)])
    assert run.exit_code == 1 and "not compared" in run.stderr


def test_report_of_an_empty_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    run = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert run.exit_code == 1 and "no fleet found" in run.stderr
