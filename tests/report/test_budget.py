"""The table, the sentence and the figure of a search for the bits of each weight."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

from lora_export.contracts import BudgetSearch, BudgetStep
from lora_export.report import budget
from lora_export.storage.documents import as_json
from tests.report.conftest import full_report, write

STEPS = (
    BudgetStep(89_100_000, 0, 0, 0.93, 0.004, 0.16, 0.5, 32.1),
    BudgetStep(97_500_000, 9, 0, 0.9703, 0.003, 0.09, 0.5, 29.6, chosen=True),
    BudgetStep(110_000_000, 23, 1, 0.98, math.nan, 0.05, 0.5, 28.9),
)
SEARCH = BudgetSearch(0.97, None, 57, 23, STEPS, 61.5)


def test_budget_sentence_says_what_was_asked_for_and_taken() -> None:
    text = budget.sentence(SEARCH)
    assert "at least 97.00% of the adapter's effect" in text and "at most" not in text
    assert "Taken: 97.50 MB, which keep 97.03% ± 0.30%" in text
    assert "more bits for 9 of 57 groups of weights; 3 exports were made and measured" in text
    assert "at most 100.00 MB" in budget.sentence(replace(SEARCH, max_size=100_000_000))


def test_budget_rows_have_every_step_and_mark_the_taken_one() -> None:
    rows = budget.rows(SEARCH)
    assert rows[1] == ("97.50 MB", "9", "0", "97.03% ± 0.30%", "0.09", "29.6", "taken")
    assert [row[-1] for row in rows] == ["", "taken", ""]
    assert rows[2][3] == "98.00%", "one text has no error between texts"


def _heights(svg: str, marker: str) -> list[float]:
    """Of the points that are drawn with a marker, from the top."""
    return [float(y) for y in re.findall(rf'<use xlink:href="#{marker}" x="[\d.]+" y="([\d.]+)"', svg)]


def test_budget_frontier_draws_share_and_perplexity_of_each_step() -> None:
    svg = budget.frontier(SEARCH)
    assert svg is not None and ">perplexity<" in svg and ">effect kept, %<" in svg
    series = [p for p in re.findall(r'<use xlink:href="#(\w+)"', svg) if len(_heights(svg, p)) == 2 * len(STEPS)]
    (marker,) = set(series)
    shares, perplexities = _heights(svg, marker)[:3], _heights(svg, marker)[3:]
    assert shares == sorted(shares, reverse=True), "more is kept, higher up"
    assert perplexities == sorted(perplexities), "perplexity falls"


def test_budget_frontier_of_an_encoder_has_no_perplexity() -> None:
    steps = tuple(replace(s, perplexity=None, kl_lost=None, kl_allowed=None) for s in STEPS)
    svg = budget.frontier(replace(SEARCH, steps=steps))
    assert svg is not None and ">perplexity<" not in svg


def test_budget_single_export_is_no_frontier() -> None:
    assert budget.frontier(replace(SEARCH, steps=STEPS[1:2])) is None


def test_report_with_budget_is_read_again_and_drawn(tmp_path: Path) -> None:
    document = json.loads(json.dumps(full_report())) | {"budget": as_json(SEARCH)}
    write(document, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What each size keeps of the adapter" in html and html.count("<figure>") == 5
    assert "97.03% ± 0.30%" in (tmp_path / "report.md").read_text(encoding="utf-8")
