"""Two reports side by side."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_export.escape import one_line
from lora_export.report.latency import cell_key, cell_name
from lora_export.report.story import Row
from lora_export.report.text import DASH, milliseconds, number, percent, ratio, size

Report = Mapping[str, Any]


def compare(a: Report, b: Report) -> list[Row]:
    """(what, this run, the other run) for everything that both could say; a dash where one did not."""
    rows: list[Row] = [("Run", one_line(a["title"]), one_line(b["title"]))]
    rows += [("Status", one_line(a["status"]), one_line(b["status"]))]
    rows += _stage(a, b, "merge", _merge_facts)
    rows += _stage(a, b, "validate", _check_facts)
    rows += _stage(a, b, "export", _export_facts)
    rows += _stage(a, b, "benchmark", _latency_facts)
    rows += [(f"{name}, this ÷ the other", change, "") for name, change in _changes(a, b)]
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
    graph = bench.get("graph") or {}
    machine = bench.get("environment") or {}
    rows = {
        "Provider": one_line(bench["provider"]),
        "Machine": ", ".join(one_line(part) for part in (machine.get("cpu"), *_gpus(machine)) if part) or DASH,
        "ONNX Runtime": one_line(machine.get("onnxruntime") or DASH),
        "Graph of the merged model": one_line(graph.get("merged_sha256") or DASH)[:16],
    }
    for cell in sorted(bench["cells"], key=cell_key):
        for name, arm in (cell.get("arms") or {}).items():
            p50 = arm["p50"]
            rows[f"{cell_name(cell)}: {one_line(name)}"] = (
                f"{milliseconds(p50['ms'])} ms ({milliseconds(p50['low'])} … {milliseconds(p50['high'])})"
            )
        if not cell.get("arms"):
            rows[f"{cell_name(cell)}: merged"] = f"{milliseconds(cell['merged_ms'])} ms"
        rows[f"{cell_name(cell)}: merged ÷ base"] = ratio(cell["ratio"])
        rows[f"{cell_name(cell)}: verdict"] = one_line(cell["verdict"])
    return rows


def _gpus(machine: Report) -> list[str]:
    found = machine.get("gpus")
    return [str(g.get("name")) for g in found if isinstance(g, Mapping)] if isinstance(found, list) else []


def _changes(a: Report, b: Report) -> list[Row]:
    """(cell and arm, this run ÷ the other) of the medians of what both measured: two runs, so not paired, and good
    for differences that are larger than those between two runs of one thing."""
    left, right = _medians(a["benchmark"]), _medians(b["benchmark"])
    return [(key, f"{left[key] / right[key]:.3f}") for key in left if right.get(key)]


def _medians(bench: Report | None) -> dict[str, float]:
    cells = bench["cells"] if bench else ()
    return {
        f"{cell_name(cell)}: {one_line(name)}": arm["p50"]["ms"]
        for cell in cells
        for name, arm in (cell.get("arms") or {"merged": {"p50": {"ms": cell["merged_ms"]}}}).items()
        if arm["p50"]["ms"]
    }
