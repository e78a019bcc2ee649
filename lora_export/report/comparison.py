"""Two reports side by side."""

from collections.abc import Mapping

from lora_export.contracts import BenchmarkResult, Cell, ExportResult, MergeResult, Report, ValidationResult
from lora_export.escape import one_line
from lora_export.report.latency import cell_name
from lora_export.report.story import Row
from lora_export.wording import (
    DASH,
    VERDICTS,
    calibration,
    milliseconds,
    number,
    output_error,
    percent,
    ratio,
    size,
)

_Facts = Mapping[str, str]


def comparison(a: Report, b: Report) -> list[Row]:
    """(what, this run, the other run) for everything that either of them has; a dash where one does not."""
    rows: list[Row] = [("Run", one_line(a.title), one_line(b.title)), ("Status", a.status, b.status)]
    for left, right in zip(_stages(a), _stages(b), strict=True):
        rows += [(name, left.get(name, DASH), right.get(name, DASH)) for name in {**left, **right}]
    return [*rows, *_changes(a.benchmark, b.benchmark)]


def _stages(report: Report) -> list[_Facts]:
    return [
        _merge_facts(report.merge) if report.merge else {},
        _check_facts(report.validate) if report.validate else {},
        _export_facts(report.export) if report.export else {},
        _latency_facts(report.benchmark) if report.benchmark else {},
    ]


def _merge_facts(merge: MergeResult) -> _Facts:
    return {
        "Update that survived": percent(merge.delta_survival),
        "Type written": one_line(merge.dtype),
        "Base weights": one_line(merge.base_weights),
    }


def _check_facts(validate: ValidationResult) -> _Facts:
    return {one_line(c.name): number(c.value, 4) + ("" if c.passed else " (failed)") for c in validate.checks}


def _export_facts(export: ExportResult) -> _Facts:
    return {
        "Engine": one_line(export.engine),
        "Precision": export.precision,
        "Graph nodes": number(export.nodes),
        "Exported size": size(sum(export.files.values())),
        **({"Calibrated on": one_line(calibration(export))} if export.calibration else {}),
        **({"Largest error of outputs": one_line(output_error(export.quantized))} if export.quantized else {}),
    }


def _latency_facts(bench: BenchmarkResult) -> _Facts:
    machine = bench.environment
    parts = [machine.cpu, *(gpu.name for gpu in machine.gpus)]
    rows = {
        "Provider": one_line(bench.provider),
        "Machine": ", ".join(one_line(part) for part in parts if part) or DASH,
        "ONNX Runtime": one_line(machine.onnxruntime or DASH),
        "Graph of the merged model": one_line(bench.graph.merged_sha256)[:16] if bench.graph else DASH,
    }
    for cell in sorted(bench.cells, key=lambda c: c.key):
        name = cell_name(cell)
        for arm, times in cell.arms.items():
            p50 = times.p50
            between = f"{milliseconds(p50.low)} … {milliseconds(p50.high)}"
            rows[f"{name}: {one_line(arm)}"] = f"{milliseconds(p50.ms)} ms ({between})"
        if not cell.arms:
            rows[f"{name}: merged"] = f"{milliseconds(cell.merged_ms)} ms"
        rows |= {f"{name}: merged ÷ base": ratio(cell.ratio), f"{name}: verdict": VERDICTS[cell.verdict]}
    return rows


def _changes(a: BenchmarkResult | None, b: BenchmarkResult | None) -> list[Row]:
    """This run ÷ the other, of the medians of what both measured: two runs, so not paired, and meaningful only for
    differences that are larger than those between two runs of the same thing."""
    left, right = _medians(a.cells if a else ()), _medians(b.cells if b else ())
    return [(f"{key}, this ÷ the other", f"{left[key] / right[key]:.3f}", "") for key in left if key in right]


def _medians(cells: tuple[Cell, ...]) -> dict[str, float]:
    medians = {
        f"{cell_name(cell)}: {one_line(name)}": ms
        for cell in cells
        for name, ms in ({n: arm.p50.ms for n, arm in cell.arms.items()} or {"merged": cell.merged_ms}).items()
    }
    return {name: ms for name, ms in medians.items() if ms}
