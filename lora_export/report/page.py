"""The HTML page: one file, no script, nothing loaded from anywhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.escape import one_line, printable
from lora_export.report import latency, latency_plots, plots, proof, story
from lora_export.report.text import count, percent

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_SAMPLE_FIELDS = ("prompt", "base", "unmerged", "merged", "first_difference")


def html(
    report: Mapping[str, Any],
    samples: Mapping[str, Mapping[str, Sequence[float]]],
    comparison: Sequence[story.Row] = (),
) -> str:
    """The whole page; every string of the report is escaped by the template."""
    from markupsafe import Markup

    drawn = {k: Markup(v) if v else None for k, v in _plots(report, samples).items()}
    context = _header(report) | _stages(report) | {"comparison": comparison, "plots": drawn}
    return environment().get_template("report.html.j2").render(css=stylesheet(), **context).lstrip() + "\n"


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


def _plots(
    report: Mapping[str, Any], samples: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, str | None]:
    merge, validate, bench = report["merge"], report["validate"], report["benchmark"]
    return {
        "layers": plots.layers(merge["records"]) if merge else None,
        "kl": plots.kl_by_position(validate["kl_by_position"]) if validate else None,
        "forest": latency_plots.forest(bench) if bench else None,
        "overheads": latency_plots.overheads(bench) if bench else None,
        "latency": latency_plots.latency(bench, samples) if bench else None,
    }


def _header(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "title": one_line(report["title"]),
        "standing": story.standing(report),
        "headline": story.headline(report),
        "badges": story.badges(report),
        "about": [*story.sources(report), ("Made", one_line(report["created"]).replace("T", " "))],
        "tool_version": one_line(report["tool_version"]),
        "options": story.flattened(report["options"]),
    }


def _stages(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template asks of each stage; empty where a stage did not run."""
    merge, validate, export, bench = (report[s] for s in ("merge", "validate", "export", "benchmark"))
    return {
        "merge": bool(merge),
        "merge_facts": story.merge_facts(merge) if merge else (),
        "merge_warnings": _lines(merge, "warnings"),
        "weakest": story.weakest_records(merge) if merge else (),
        "validate": bool(validate),
        "checks": story.check_rows(validate) if validate else (),
        "weight_errors": _lines(validate, "weight_errors"),
        "perplexities": proof.perplexity_rows(validate) if validate else (),
        "bases": proof.base_rows(validate) if validate else (),
        "survivals": proof.survival_rows(validate) if validate else (),
        "heads": {
            "perplexities": proof.PERPLEXITY_HEAD,
            "bases": proof.BASES_HEAD,
            "survivals": proof.SURVIVAL_HEAD,
        },
        "samples": [_sample(s) for s in validate["samples"]] if validate else (),
        "export": bool(export),
        "export_facts": story.export_facts(export) if export else (),
        "files": story.file_rows(export) if export else (),
    } | _latency(bench)


def _latency(bench: Mapping[str, Any] | None) -> dict[str, Any]:
    if not bench:
        return {"bench": False}
    machine = {k: v for k, v in (bench.get("environment") or {}).items() if k != "blocks"}
    return {
        "bench": True,
        "latency_facts": latency.facts(bench),
        "latency": latency.rows(bench),
        "arms_head": latency.ARMS_HEAD,
        "arm_tables": latency.arm_tables(bench),
        "forest_caption": _forest_caption(bench),
        "method": latency.method(bench),
        "limits": latency.limits(bench),
        "bench_notes": _lines(bench, "notes"),
        "graph_warnings": list(latency.warnings(bench)),
        "graph_differences": _lines(bench, "graph_differences"),
        "conditions_head": latency.CONDITIONS_HEAD,
        "conditions": latency.conditions(bench),
        "machine": story.flattened(machine),
    }


def _lines(stage: Mapping[str, Any] | None, name: str, limit: int = 50) -> list[str]:
    items = [one_line(item) for item in (stage or {}).get(name) or ()]
    more = len(items) - limit
    return [*items[:limit], f"and {count(more, 'more')[:-1]}"] if more > 0 else items


def _sample(sample: Mapping[str, Any]) -> dict[str, str | None]:
    return {name: printable(sample[name]) if name in sample else None for name in _SAMPLE_FIELDS}


def _forest_caption(bench: Mapping[str, Any]) -> str:
    margin = latency.margin_of(bench)
    band = (
        f" The band is the margin of ±{percent(margin, 1)}: an interval inside it means no difference."
        if margin
        else ""
    )
    return f"Merged against the base with its 90 % interval, and in grey how far the base is from itself.{band}"
