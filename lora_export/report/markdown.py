"""The short version, for a pull request or a terminal."""

from collections.abc import Sequence

from lora_export.contracts import BenchmarkResult, Report, ValidationResult
from lora_export.escape import markdown as escaped
from lora_export.report import budget, latency, pictures, story

_TONES = {"good": "✅", "bad": "❌", "unsure": "⚠️", "off": "➖"}


def markdown(report: Report, comparison: Sequence[story.Row] = ()) -> str:
    verdict, tone = story.verdict(report)
    status = f"{_TONES[tone]} {f'**{verdict}**' if tone == 'bad' else verdict}"
    lines = [f"# {escaped(report.title)}", "", status, "", escaped(" ".join(story.headline(report))), ""]
    lines += [" · ".join(f"{_TONES[b.tone]} {b.stage} {escaped(b.text)}" for b in story.badges(report)), ""]
    lines += [f"- {escaped(kind)}: {escaped(name)}" for kind, name in story.sources(report)]
    lines += _images(report)
    lines += _validation(report.validate) if report.validate else []
    lines += _latency(report.benchmark) if report.benchmark else []
    lines += _facts("Merge", story.merge_facts(report.merge)) if report.merge else []
    lines += _facts("Export", story.export_facts(report.export)) if report.export else []
    if report.budget:
        rows = budget.rows(report.budget)
        lines += [
            "",
            "## Budget",
            "",
            escaped(budget.sentence(report.budget)),
            "",
            *_table(budget.HEAD, rows, "rrrrrrl"),
        ]
    if report.cache:
        notes = [line for note in report.cache.notes for line in ("", escaped(note))]
        rows = story.cache_rows(report.cache)
        table = ["", *_table(story.CACHE_HEAD, rows, "llll")] if rows else []
        lines += ["", "## What was known of the base", *notes, *table]
    if comparison:
        table = _table(("", "this run", "the other run"), comparison, "lrr")
        lines += ["", "## Compared with another run", "", *table]
    made = f"lora-export {escaped(report.tool_version)}, {escaped(report.created)}"
    return "\n".join([*lines, "", f"<sub>{made}. All figures: report.json, samples.json.</sub>", ""])


def _images(report: Report) -> list[str]:
    """The pictures of a pipeline, as files beside the page, its models and its adapters."""
    lines: list[str] = []
    if report.validate and report.validate.pictures:
        lines += ["", "## Pictures"]
        for row in (pictures.pictures(report.validate, {}), pictures.differences(report.validate, {})):
            shown = [s for s in row if s is not None]
            names = [escaped(s.name) for s in shown]
            files = [f"![{name}]({pictures.FOLDER}/{s.file})" for name, s in zip(names, shown, strict=True)]
            words = [escaped(s.words) for s in shown]
            rule = ["---" for _ in shown]
            lines += ["", *(f"| {' | '.join(cells)} |" for cells in (names, rule, files, words) if shown)]
    if report.pipeline:
        models = pictures.models(report.pipeline, report.merge)
        lines += ["", "## The pipeline and the adapter", "", *_table(pictures.MODELS_HEAD, models, "llrrlrl")]
        lines += ["", *_table(pictures.ADAPTERS_HEAD, pictures.adapters(report.pipeline), "llllr")]
    return lines


def _validation(validate: ValidationResult) -> list[str]:
    rows = [(c.label, c.value, c.threshold, "passed" if c.passed else "FAILED") for c in story.check_rows(validate)]
    lines = ["", "## Validation", "", *_table(("check", "value", "limit", ""), rows, "lrrl")]
    for head, rows_of in (
        (story.PERPLEXITY_HEAD, story.perplexity_rows),
        (story.BASES_HEAD, story.base_rows),
        (story.SURVIVAL_HEAD, story.survival_rows),
    ):
        if table := rows_of(validate):
            lines += ["", *_table(head, table, "l" + "r" * (len(head) - 1))]
    return lines


def _latency(bench: BenchmarkResult) -> list[str]:
    """The table of cells in the open, all else folded away."""
    head = ("cell", "base ms", "merged ms", "unmerged ms", "ratio", "90 % interval", "noise floor", "verdict")
    rows = [(*row[:7], row[9]) for row in latency.rows(bench)]
    lines = ["", f"## Latency on {escaped(bench.provider)}", "", *_table(head, rows, "lrrrrrrl"), ""]
    lines += [f"- {escaped(name)}: {escaped(value)}" for name, value in latency.facts(bench)[:3]]
    lines += [f"- ⚠️ {escaped(text)}" for text in latency.warnings(bench)]
    lines += [f"- {escaped(note)}" for note in bench.notes]
    for name, arms in latency.arm_tables(bench):
        cells = [[f"{value} ({small})" if small else value for value, small in row] for row in arms]
        lines += _folded(escaped(name), _table(latency.arms_head(bench), cells, "lrrrrrr"))
    if parts := latency.part_rows(bench):
        lines += ["", *_table(latency.PARTS_HEAD, parts, "llrl")]
    if pictures := latency.picture_rows(bench):
        lines += ["", *_table(latency.PICTURES_HEAD, pictures, "lrrr")]
    differences = [f"- {escaped(text)}" for text in bench.graph_differences]
    lines += _folded("Where the graphs differ", differences)
    text = [escaped(" ".join(latency.method(bench))), "", *(f"- {escaped(text)}" for text in latency.limits(bench))]
    return [*lines, *_folded("How it was measured, and what it does not show", text)]


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"<details><summary>{title}</summary>", "", *lines, "", "</details>"] if lines else []


def _facts(title: str, rows: Sequence[story.Row]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {escaped(name)}: {escaped(value)}" for name, value in rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    rule = " | ".join("---:" if side == "r" else "---" for side in align)
    body = [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"| {rule} |", *body]
