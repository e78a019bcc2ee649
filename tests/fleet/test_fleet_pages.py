"""The pages and metrics of a fleet: what they say, and what no name can make of them."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lora_export import records
from lora_export.contracts import (
    FleetReport,
    Record,
    RowFigures,
)
from lora_export.fleet.stores.protocol import opened
from lora_export.report import fleet_document, fleet_metrics, fleet_page, fleet_story
from lora_export.report.fleet_plots import Point, histogram
from tests.fleet.made_up import FolderPlace, Made, with_row
from tests.report.test_report_pages import HOSTILE, Page


class FleetPage(Page):
    VOID = (*Page.VOID, "input")


NAN = math.nan


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


def test_pages_say_the_verdicts_on_latency(made: Made, place: FolderPlace) -> None:
    first = next(i for i, row in enumerate(made[0].rows) if row.state == "done")
    report, page, text, prom = written(with_row(made, first, figures=RowFigures(verdict="slower")), place)
    assert report.rows[first].verdict == "slower"
    same = sum(r.verdict == "equivalent_by_structure" for r in report.rows)
    assert f"Latency against the base: {same} equivalent by structure, 1 slower." in page.words
    assert f"{same} equivalent by structure, 1 slower" in text
    found = {of: v for (name, of), v in samples(prom).items() if name.endswith("latency_verdicts")}
    assert len(found) == 4 * len(report.bases)
    assert sum(v for of, v in found.items() if 'verdict="equivalent_by_structure"' in of) == same
    assert sum(v for of, v in found.items() if 'verdict="slower"' in of) == 1


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
    base = made[1][0].row.base
    at = max(at for at, plan in enumerate(made[1]) if plan.row.base == base and made[0].rows[at].state == "done")
    _, _, _, prom = written(with_row(made, at, figures=RowFigures(survival=NAN)), place)
    found = [v for (n, of), v in samples(prom).items() if n.endswith("survival_ratio") and f'base="{base}"' in of]
    assert len(found) == 5 and all(map(math.isnan, found))


def test_metrics_escape_labels(made: Made, place: FolderPlace) -> None:
    report = fleet_document.write(*made, place)
    text = fleet_metrics.metrics(replace(report, root='a\\b"c\nd'))
    assert 'root="a\\\\b\\"c\\nd"' in text
    samples(text)
