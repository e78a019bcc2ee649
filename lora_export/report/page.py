"""The HTML page: one file, no script, nothing loaded from anywhere."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import BenchmarkResult, Continuation, Report, Samples
from lora_export.escape import one_line, printable
from lora_export.report import latency, latency_plots, plots, story
from lora_export.storage.documents import as_json
from lora_export.wording import percent

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"

Context = dict[str, object]  # what a template is given


def html(report: Report, samples: Samples, comparison: Sequence[story.Row] = ()) -> str:
    """The whole page; every string of the report is escaped by the template."""
    from markupsafe import Markup

    drawn = {k: Markup(v) if v else None for k, v in _plots(report, samples).items()}
    context = _header(report) | _stages(report) | _benchmark(report.benchmark)
    context |= {"comparison": comparison, "plots": drawn, "css": stylesheet()}
    return environment().get_template("report.html.j2").render(context).lstrip() + "\n"


def environment() -> "Environment":
    """Templates in which every string is escaped, and none may be missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def stylesheet() -> "Markup":
    from markupsafe import Markup

    return Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8"))


def _plots(report: Report, samples: Samples) -> dict[str, str | None]:
    merge, validate, bench = report.merge, report.validate, report.benchmark
    return {
        "layers": plots.layers(merge.records) if merge else None,
        "kl": plots.kl_by_position(validate.kl_by_position) if validate else None,
        "forest": latency_plots.forest(bench) if bench else None,
        "overheads": latency_plots.overheads(bench) if bench else None,
        "latency": latency_plots.latency(bench, samples) if bench else None,
    }


def _header(report: Report) -> Context:
    return {
        "title": one_line(report.title),
        "verdict": story.verdict(report),
        "headline": story.headline(report),
        "badges": story.badges(report),
        "about": [*story.sources(report), ("Made", one_line(report.created).replace("T", " "))],
        "tool_version": one_line(report.tool_version),
        "options": story.flattened(report.options),
    }


def _stages(report: Report) -> Context:
    """What the template asks of each stage; empty where a stage did not run."""
    merge, validate, export = report.merge, report.validate, report.export
    return {
        "merge": bool(merge),
        "merge_facts": story.merge_facts(merge) if merge else (),
        "merge_warnings": _lines(merge.warnings) if merge else (),
        "weakest": story.weakest_records(merge) if merge else (),
        "validate": bool(validate),
        "checks": story.check_rows(validate) if validate else (),
        "weight_errors": _lines(validate.weight_errors) if validate else (),
        "perplexities": story.perplexity_rows(validate) if validate else (),
        "bases": story.base_rows(validate) if validate else (),
        "survivals": story.survival_rows(validate) if validate else (),
        "heads": {
            "perplexities": story.PERPLEXITY_HEAD,
            "bases": story.BASES_HEAD,
            "survivals": story.SURVIVAL_HEAD,
            "records": story.RECORDS_HEAD,
        },
        "samples": [_sample(s) for s in validate.samples] if validate else (),
        "export": bool(export),
        "export_facts": story.export_facts(export) if export else (),
        "files": story.file_rows(export) if export else (),
    }


def _benchmark(bench: BenchmarkResult | None) -> Context:
    if bench is None:
        return {"bench": False}
    machine: dict[str, object] = as_json(bench.environment)
    return {
        "bench": True,
        "latency_facts": latency.facts(bench),
        "latency": latency.rows(bench),
        "arms_head": latency.ARMS_HEAD,
        "arm_tables": latency.arm_tables(bench),
        "forest_caption": _forest_caption(bench),
        "method": latency.method(bench),
        "limits": latency.limits(bench),
        "bench_notes": _lines(bench.notes),
        "graph_warnings": latency.warnings(bench),
        "graph_differences": _lines(bench.graph_differences),
        "conditions_head": latency.CONDITIONS_HEAD,
        "conditions": latency.conditions(bench),
        "machine": story.flattened({k: v for k, v in machine.items() if k != "blocks"}),
    }


def _lines(texts: Sequence[str], limit: int = 50) -> list[str]:
    more = [f"and {len(texts) - limit:,} more"] if len(texts) > limit else []
    return [*map(one_line, texts[:limit]), *more]


def _sample(sample: Continuation) -> Continuation:
    texts = {name: printable(text) for name, text in vars(sample).items() if text is not None}
    return replace(sample, **texts)


def _forest_caption(bench: BenchmarkResult) -> str:
    margin = latency.margin_of(bench)
    text = "Merged against the base with its 90 % interval; in grey, the base against itself."
    return f"{text} The band is the margin of ±{percent(margin, 1)}." if margin else text
