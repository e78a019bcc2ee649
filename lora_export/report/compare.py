"""Two reports side by side."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_export.report.story import Row, cell_key, cell_name
from lora_export.report.text import DASH, milliseconds, number, one_line, percent, size

Report = Mapping[str, Any]


def compare(a: Report, b: Report) -> list[Row]:
    """(what, this run, the other run) for everything that both could say; a dash where one did not."""
    rows: list[Row] = [("Run", one_line(a["title"]), one_line(b["title"]))]
    rows += [("Status", one_line(a["status"]), one_line(b["status"]))]
    rows += _stage(a, b, "merge", _merge_facts)
    rows += _stage(a, b, "validate", _check_facts)
    rows += _stage(a, b, "export", _export_facts)
    rows += _stage(a, b, "benchmark", _latency_facts)
    return rows


def _stage(a: Report, b: Report, name: str, facts: Callable[[Report], dict[str, str]]) -> list[Row]:
    left = facts(a[name]) if a[name] else {}
    right = facts(b[name]) if b[name] else {}
    return [(key, left.get(key, DASH), right.get(key, DASH)) for key in {**left, **right}]


def _merge_facts(merge: Report) -> dict[str, str]:
    return {
        "Update that survived": percent(merge.get("delta_survival")),
        "Type written": one_line(merge.get("dtype") or DASH),
        "Base weights": one_line(merge.get("base_weights") or DASH),
    }


def _check_facts(validate: Report) -> dict[str, str]:
    return {
        one_line(c["name"]): number(c["value"], 4) + ("" if c["passed"] else " (failed)")
        for c in validate["checks"]
    }


def _export_facts(export: Report) -> dict[str, str]:
    return {
        "Engine": one_line(export["engine"]),
        "Precision": one_line(export["precision"]),
        "Graph nodes": number(export["nodes"]),
        "Exported size": size(sum(export["files"].values())),
    }


def _latency_facts(bench: Report) -> dict[str, str]:
    rows = {"Provider": one_line(bench["provider"])}
    for cell in sorted(bench["cells"], key=cell_key):
        rows[f"{cell_name(cell)}: merged"] = f"{milliseconds(cell['merged_ms'])} ms"
        rows[f"{cell_name(cell)}: verdict"] = one_line(cell["verdict"])
    return rows
