"""The HTML and Markdown pages: what they say, and what no name can make of them."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import Check, ValidationResult
from lora_export.escape import markdown as escaped
from lora_export.report import compare, story
from lora_export.wording import number, size
from tests.daily import daily
from tests.report.conftest import write

HOSTILE = '<script>alert("1")</script>\'"\n\n# <img src=x onerror=alert(1)> $x$ | `a` {{ 7*7 }} \x00\x1b[31m\u202e'
Samples = dict[str, dict[str, tuple[float, ...]]]


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether its tags close."""

    VOID = ("meta", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def pages(report: dict[str, Any], folder: Path, samples: Samples | None = None) -> tuple[Page, str, str]:
    write(report, folder, samples)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return Page(html), html, (folder / "report.md").read_text(encoding="utf-8")


def test_report_summary_is_on_top(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    page, _, text = pages(full, tmp_path, timings)
    for words in (page.words, text):
        assert "Passed" in words
        assert "The merge used 300 of 300 adapter tensors and changed 150 weights" in words
        assert "computes what the adapter was trained to compute: all 5 checks passed" in words
        assert "as fast as the base, within ±1%, in all 2 cells" in words
        assert "support-bot-lora × 0.7" in words and "93efa2f097d5" in words
    assert "Latency equivalent" in page.words and "Graph identical" in page.words
    assert page.tags.count("figure") == 5 and page.tags.count("svg") == 5
    assert not page.open
    assert "three times rounding alone" in page.words
    assert "0.9961 … 1.0032" in page.words and "271.31" in page.words


def test_report_has_percentiles_and_rates_per_arm(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    page, _, text = pages(full, tmp_path, timings)
    assert "time to first token 271.20 ms, merged; cache in place; control: unmerged" in page.words
    row = "pytorch 86.08 85.22 … 86.94 94.68 93.74 … 95.63 103.29 102.26 … 104.32 11.62 3.6000 3.5640 … 3.6360"
    assert row in page.words
    assert "| pytorch | 86.08 (85.22 … 86.94) |" in text
    for words in (page.words, text.replace("\\", "")):
        assert "Canonical hash, base and merged" in words and "5a5a5a5a5a5a5a5a" in words
        assert "All arms (base, merged, unmerged, plugged, pytorch) and a second session of the base" in words
        assert "Only these batch sizes and prompt lengths were measured: 1 × 128." in words
        assert "on a GPU the relative cost of an unmerged adapter is different" in words
        assert "writes in place is faster" not in words
    assert "GPU 0: clock, MHz 1,200 1,980 1,980" in page.words and "throttled power limit" in page.words


def test_report_of_a_gpu_names_cuda_graphs_and_strays(full: dict[str, Any], tmp_path: Path) -> None:
    bench = full["benchmark"]
    captured = [{**cell, "cuda_graph": True} for cell in bench["cells"]]
    stray = "merged: MatMul /lm_head/MatMul ran on CPUExecutionProvider"
    bench |= {
        "provider": "cuda",
        "provider_verified": False,
        "cells": [*bench["cells"], *captured],
        "notes": [stray],
    }
    page, _, text = pages(full, tmp_path)
    for words in (page.words, text.replace("\\", "")):
        assert "decode · batch 1 · 128 tokens · CUDA graph" in words
        assert stray in words and "cuda, not verified" in words
        assert "on a GPU the relative cost of an unmerged adapter is different" not in words


def test_report_mentions_session_sets(full: dict[str, Any], tmp_path: Path) -> None:
    assert "for one set of sessions" in pages(full, tmp_path / "one")[0].words
    for cell in full["benchmark"]["cells"]:
        cell["sessions"] = 12
    words = pages(full, tmp_path / "many")[0].words
    assert "the spread between 12 sets of sessions" in words and "44 in 12 sets" in words
    assert "for one set of sessions" not in words


def test_report_has_graph_warnings_and_differences(full: dict[str, Any], tmp_path: Path) -> None:
    graph = full["benchmark"]["graph"]
    graph |= {"identical": False, "merged_sha256": "6b" * 32, "warnings": ["<b>wider</b>"], "differences": ["n: x"]}
    full["benchmark"] |= {"graph_identical": False, "graph_differences": ["n: x"]}
    page, html, text = pages(full, tmp_path)
    assert "Graph differs" in page.words and "5a5a5a5a5a5a5a5a, 6b6b6b6b6b6b6b6b" in page.words
    assert "What would slow the merged model down" in page.words and "<b>wider" not in html
    assert "Where the graphs differ" in page.words and "&lt;b&gt;wider" in text


def test_report_inconclusive_measurement_is_no_pass(full: dict[str, Any], tmp_path: Path) -> None:
    full |= {"merge": None, "validate": None, "export": None}
    full["benchmark"]["verdict"] = "inconclusive"
    page, _, text = pages(full, tmp_path)
    assert "No verdict" in page.words and "⚠️ No verdict" in text and "Passed" not in page.words + text
    assert "the graph cannot make a difference" in page.words


def test_report_without_arms_is_read(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    for cell in full["benchmark"]["cells"]:
        for name in ("arms", "control", "kv_in_place", "reason"):
            del cell[name]
    del full["benchmark"]["graph"]
    page, _, _ = pages(full, tmp_path, timings)
    assert page.tags.count("svg") == 5 and "unmerged · decode" in page.words and "None" not in page.words


def test_report_has_figures_of_proof(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    page, _, text = pages(full, tmp_path, timings)
    for words in (page.words, text):
        assert "Perplexity on the test text: 28.83 merged, 28.82 unmerged, 40.94 for the base." in words
        assert "Ship the dequantized merge: it is the function that was trained." in words
        assert "at most 0.5 and on average 0.25 units in the last place, in 691,200 elements of 150" in words
    assert "onnx int4 30.4 -25.7 % 612" in page.words and "| onnx int4 | 30.4 | -25.7 % | 612 |" in text
    assert "original 50.81 0.04" in page.words and "| original | 50.81 | 0.04 |" in text
    assert "onnx int4 93.00% ± 1.20% 0.41 0.07 ± 0.003" in page.words
    assert "| onnx int4 | 93.00% ± 1.20% | 0.41 | 0.07 ± 0.003 |" in text


def test_report_says_what_an_export_was_calibrated_on(full: dict[str, Any], tmp_path: Path) -> None:
    calibrated = {"text_sha256": "e2e347fa962b6f3c" + "0" * 48, "tokens": 6811, "windows": 200}
    full["export"] |= {"activations": "static", "calibration": calibrated}
    page, _, text = pages(full, tmp_path)
    for words in (page.words, text):
        assert "static, 8 bits" in words and "in 200 pieces, text e2e347fa962b6f3c" in words


def test_report_without_proof_is_read(full: dict[str, Any], tmp_path: Path) -> None:
    for name in ("perplexities", "bases", "adapter_survival", "advice", "deviation"):
        del full["validate"][name]
    for record in full["merge"]["records"]:
        del record["max_ulps"], record["checked"]
    page, _, _ = pages(full, tmp_path)
    assert "Perplexity on a text" not in page.words and "last place" not in page.words and "None" not in page.words


def test_report_names_deviation_on_top(full: dict[str, Any], tmp_path: Path) -> None:
    full["status"], full["validate"]["passed"] = "failed", False
    full["validate"]["deviation"] = {
        "module": "model.layers.3.mlp", "value": 0.21, "floor": 0.003,
        "tensors": ["model.layers.3.mlp.up_proj.weight"]
    }  # fmt: skip
    for words in (pages(full, tmp_path)[0].words, pages(full, tmp_path)[2]):
        assert "The first module that differs is model.layers.3.mlp: its output is off by 0.21" in words.replace(
            "\\", ""
        )
        assert "Look at model.layers.3.mlp.up" in words.replace("\\", "")


@pytest.mark.parametrize("size", daily([5e305, 1e307, 1.7e308, -1e300, 1e30], [1.7e308, 1e30]))
def test_report_plots_omit_numbers_beyond_axes(
    full: dict[str, Any], timings: Samples, tmp_path: Path, size: float
) -> None:
    full["benchmark"]["environment"]["margin"] = size
    page, _, _ = pages(full, tmp_path, timings)
    full["benchmark"]["cells"][0] |= {"ratio": size, "ci_low": size, "ci_high": size, "unmerged_ci_high": size}
    full["merge"]["records"][0] |= {"relative_delta": size, "survival": size}
    full["validate"]["kl_by_position"][3] = size
    some = {cell: {arm: (size, *times) for arm, times in arms.items()} for cell, arms in timings.items()}
    page, _, _ = pages(full, tmp_path, some)
    assert page.tags.count("svg") == 5 and not page.open


def test_report_mentions_saturated_elements(full: dict[str, Any], tmp_path: Path) -> None:
    full["merge"]["records"][2]["saturated"] = 3
    assert "Saturated elements 3" in pages(full, tmp_path)[0].words


def test_report_shows_greedy_divergence(full: dict[str, Any], tmp_path: Path) -> None:
    assert "First difference: prompt 1, token 15" in pages(full, tmp_path)[0].words


def test_report_pages_are_reproducible(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    _, first, _ = pages(full, tmp_path / "a", timings)
    _, second, _ = pages(full, tmp_path / "b", timings)
    assert first == second


def test_report_page_loads_and_runs_nothing(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    page, html, _ = pages(full, tmp_path, timings)
    policy = next(v for tag, name, v in page.attributes if tag == "meta" and name == "content")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on")]
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png"))
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_report_escapes_model_names(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    hostile = poisoned(full)
    page, html, text = pages(hostile, tmp_path, {HOSTILE: {HOSTILE: (1.0,)}} | timings)  # type: ignore[arg-type]
    assert "<script" not in html.lower() and "<img" not in html.lower()
    assert not {"script", "img"} & set(page.tags) and not page.open
    assert "alert" in page.words and "49" not in re.findall(r"\{\{.*?\}\}", page.words)
    assert "\x00" not in html and "\x1b" not in html and "\u202e" not in html
    assert "<script" not in text and "<img" not in text
    # A newline must not start a heading, nor a pipe a column.
    assert all(not line.startswith("# ") for line in text.splitlines()[1:])
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {4, 5, 8, 9}


def poisoned(value: Any, key: str = "") -> Any:
    """Every free string of a report replaced by a hostile one, names of layers only in part."""
    if key in ("status", "verdict", "phase", "operation", "precision", "kind", "activations"):
        return value
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [poisoned(v, key) for v in value]
    if isinstance(value, str):
        return value + HOSTILE if ".layers." in value else HOSTILE
    return value


@pytest.mark.parametrize("stage", ["merge", "validate", "export", "benchmark"])
def test_report_names_skipped_stage(full: dict[str, Any], stage: str, tmp_path: Path) -> None:
    full[stage] = None
    page, _, text = pages(full, tmp_path)
    assert "not run" in page.words and "not run" in text
    assert not page.open


def test_report_without_stages_is_drawn(full: dict[str, Any], tmp_path: Path) -> None:
    page, _, _ = pages(full | dict.fromkeys(("merge", "validate", "export", "benchmark")), tmp_path)
    assert page.words.count("not run") == 4
    assert "was not checked" in page.words and "not compared with the base" in page.words


def test_report_failure_is_prominent(full: dict[str, Any], tmp_path: Path) -> None:
    full["status"] = "failed"
    full["validate"]["passed"] = False
    full["validate"]["checks"][1] |= {"passed": False, "value": float("nan")}
    full["validate"]["weight_errors"] = ["model.layers.3.mlp.down_proj.weight"]
    page, html, text = pages(full, tmp_path)
    for words in (page.words, text):
        assert "Failed: do not deploy this output" in words
        assert "does not compute what the adapter was trained to compute: 1 of 5 checks failed" in words
        assert "not a number" in words
    assert 'class="verdict bad"' in html and "✗ failed" in page.words
    assert "model.layers.3.mlp.down_proj.weight" in page.words
    assert json.loads((tmp_path / "report.json").read_text())["validate"]["checks"][1]["value"] == "nan"


def test_report_distinguishes_slower_and_inconclusive(full: dict[str, Any], tmp_path: Path) -> None:
    full["benchmark"]["verdict"] = "inconclusive"
    page, _, _ = pages(full, tmp_path)
    assert "was inconclusive" in page.words
    full["benchmark"]["verdict"] = "slower"
    full["benchmark"]["cells"][0] |= {"verdict": "slower", "ratio": 1.08}
    page, _, _ = pages(full, tmp_path)
    assert "slower than the base in 1 of 2 cells, by up to 8.0%" in page.words


def by_structure(full: dict[str, Any], *, early: bool) -> dict[str, Any]:
    """The same report with identical graphs, of which no test is claimed."""
    bench = full["benchmark"]
    for cell in bench["cells"]:
        cell |= {"verdict": "equivalent_by_structure", "ci_low": 0.9312, "ci_high": 1.0744}
    bench |= {"verdict": "equivalent_by_structure", "graph_identical": True, "ended_early": early}
    return full


@pytest.mark.parametrize("early", [True, False])
def test_report_by_structure_gives_the_interval_and_claims_no_test(
    full: dict[str, Any], tmp_path: Path, early: bool
) -> None:
    page, html, text = pages(by_structure(full, early=early), tmp_path)
    for words in (page.words, text.replace("\\", "")):
        assert "Latency equivalent by structure" in words and "Passed" in words
        assert "On CPU it is equivalent to the base by structure: both are one optimized graph" in words
        assert "Measured ratio in 2 cells, from 0.9996 to 1.0012 (90 % intervals within 0.9312 … 1.0744)." in words
        assert "No test at ±1% is claimed." in words
        assert "within ±1%, in" not in words and "inconclusive" not in words and "equivalent_by" not in words
        assert "For all others the graph alone speaks." in words and "Denormal, infinite or NaN weights" in words
        assert ("--max-time measures until the noise allows a test" in words) == early
    assert ("61.2 s, ended early" in page.words) == early
    assert html.count("good-mark nowrap") >= 2
    assert "Equivalent by structure: whether an interval lies in the band does not matter." in page.words


def test_report_by_structure_of_one_cell_names_its_ratio(full: dict[str, Any], tmp_path: Path) -> None:
    report = by_structure(full, early=True)
    report["benchmark"]["cells"] = report["benchmark"]["cells"][:1]
    page, _, _ = pages(report, tmp_path / "one")
    assert "Measured ratio 0.9996 (90 % interval 0.9312 … 1.0744)." in page.words
    report["benchmark"]["cells"] = []
    page, _, _ = pages(report, tmp_path / "none")
    assert "Measured ratio" not in page.words and "by structure" in page.words


def test_report_benchmark_without_base_is_drawn(full: dict[str, Any], tmp_path: Path) -> None:
    for cell in full["benchmark"]["cells"]:
        nothing = (k for k in cell if k.startswith(("base", "ratio", "ci_", "noise", "unmerged")))
        cell |= dict.fromkeys(nothing) | {"verdict": "inconclusive"}
    full["benchmark"] |= {"verdict": "inconclusive", "noise_floor": None, "graph_identical": None}
    page, _, _ = pages(full, tmp_path)
    assert "not compared" in page.words and "None" not in page.words


def test_compare_shows_two_runs_side_by_side(full: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(full)
    other["title"] = "another <b>run</b>"
    other["merge"]["delta_survival"] = 0.5
    other["benchmark"] = None
    write(full, tmp_path / "a")
    write(other, tmp_path / "b")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    compare(tmp_path / "a", tmp_path / "b", tmp_path / "both")
    page = Page((tmp_path / "both" / "report.html").read_text(encoding="utf-8"))
    assert "Compared with another run" in page.words
    assert "99.31% 50.00%" in page.words and "another <b>run</b>" in page.words
    assert "23.94 ms (23.70 … 24.18) –" in page.words
    text = (tmp_path / "both" / "report.md").read_text(encoding="utf-8")
    assert "| Update that survived | 99.31% | 50.00% |" in text and "<b>" not in text
    assert {path: path.read_bytes() for path in before} == before


def test_compare_has_ratio_of_common_measurements(full: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(full)
    other["benchmark"]["cells"][1]["arms"]["merged"]["p50"]["ms"] *= 2
    del other["benchmark"]["cells"][1]["arms"]["pytorch"]
    other["benchmark"]["environment"]["gpus"] = []
    write(full, tmp_path / "a")
    write(other, tmp_path / "b")
    compare(tmp_path / "a", tmp_path / "b", tmp_path / "both")
    words = Page((tmp_path / "both" / "report.html").read_text(encoding="utf-8")).words
    assert "decode · batch 1 · 128 tokens: merged, this ÷ the other 0.500" in words
    assert "decode · batch 1 · 128 tokens: base, this ÷ the other 1.000" in words
    assert "pytorch, this ÷ the other" not in words
    assert "Machine Example CPU, Example GPU Example CPU" in words


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (float("inf"), "inf"), (float("nan"), "nan"), (0.0, "0"), (0.03120, "0.0312"), (6.8e-5, "6.8e-5"),
     (1234567, "1,234,567"), (14.2071, "14.2"), (-0.5, "-0.5"), (2.0e9, "2e9"), (100.0, "100")],
)  # fmt: skip
def test_text_numbers_are_formatted(value: float | None, expected: str) -> None:
    assert number(value) == expected


def test_text_sizes_and_markdown_are_formatted() -> None:
    assert size(170_928) == "170.93 kB" and size(12) == "12 B" and size(None) == "–"
    assert escaped("a|b @user https://x [y](z)") == r"a\|b &#64;user https&#58;//x \[y\](z)"


def test_report_distinguishes_checks_of_exports() -> None:
    names = ("adapter_survival", "onnx_adapter_survival", "onnx_int4_logits_max_abs")
    rows = story.check_rows(ValidationResult(tuple(Check(name, 0.75, 0.9, passed=False) for name in names)))
    assert [(r.label, r.threshold[0]) for r in rows] == [
        ("Adapter effect retained", "≥"),
        ("Adapter effect retained (ONNX)", "≥"),
        ("Largest logit difference (ONNX int4)", "≤"),
    ]


def test_report_tells_calibration(full: dict[str, Any], tmp_path: Path) -> None:
    page, _, text = pages(full, tmp_path)
    for words in (page.words, text.replace("\\", "")):
        assert "8,192 tokens in 16 pieces, text 5f5f5f5f5f5f5f5f" in words
        assert "gptq, 210 weights by their outputs on the text; 1 to nearest" in words
        assert "2.13% in model.norm.weight" in words
