"""fleet.prom: the figures of a fleet in Prometheus' text format, version 0.0.4, for the textfile collector of
node_exporter or a push gateway."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from lora_export.contracts.fleet import STATES
from lora_export.contracts.fleet_report import FleetReport, FleetReportRow
from lora_export.wording import VERDICTS

_PREFIX = "lora_export_fleet_"
_BUCKETS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200)  # seconds of a row
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
Labels = Mapping[str, str]


def metrics(report: FleetReport) -> str:
    """One gauge or histogram a figure, by base; no series an adapter, of which there may be thousands."""
    by_base = {base.name: [r for r in report.rows if r.base == base.name] for base in report.bases}
    of_run: Labels = {"root": report.root, "version": report.tool_version, "shard": report.shard}
    lines = [*_head("info", "gauge", "The fleet and the tool that made its report."), _line("info", of_run, 1)]
    lines += _head("last_run_timestamp_seconds", "gauge", "When the last run that changed something ended.")
    lines.append(_line("last_run_timestamp_seconds", {}, datetime.fromisoformat(report.created).timestamp()))
    lines += _head("run_duration_seconds", "gauge", "How long it took.")
    lines.append(_line("run_duration_seconds", {}, report.seconds))
    lines += _head("rows", "gauge", "Adapters by base and state.")
    for name, rows in by_base.items():
        lines += [
            _line("rows", {"base": name, "state": state}, sum(r.state == state for r in rows)) for state in STATES
        ]
    lines += _head("latency_verdicts", "gauge", "Adapters by base and verdict on the latency of their graph.")
    for name, rows in by_base.items():
        lines += [
            _line("latency_verdicts", {"base": name, "verdict": v}, sum(r.verdict == v for r in rows))
            for v in VERDICTS
        ]
    lines += _sums(by_base)
    lines += _head("row_duration_seconds", "histogram", "Seconds for an adapter, when it was made.")
    for name, rows in by_base.items():
        lines += _histogram("row_duration_seconds", {"base": name}, [r.seconds for r in rows if r.place])
    for metric, words, of in (
        ("survival_ratio", "Share of the adapter's effect that is kept, by quantile over adapters.", "survival"),
        ("kl_nats", "KL divergence of the export from the merged model, by quantile over adapters.", "kl"),
    ):
        lines += _head(metric, "gauge", words)
        for name, rows in by_base.items():
            lines += _quantiles(metric, {"base": name}, [v for r in rows if (v := getattr(r, of)) is not None])
    return "\n".join(lines) + "\n"


def _sums(by_base: Mapping[str, Sequence[FleetReportRow]]) -> Iterator[str]:
    for metric, words, of in (
        ("object_bytes", "Size of all objects.", "nbytes"),
        ("attempts", "How often workers took up adapters, when they were made.", "attempts"),
        ("failed_checks", "Checks that failed.", "failed"),
        ("worker_peak_bytes", "Largest peak of a worker's memory.", "memory_bytes"),
    ):
        yield from _head(metric, "gauge", words)
        join = max if of == "memory_bytes" else sum
        for name, rows in by_base.items():
            yield _line(metric, {"base": name}, join([getattr(r, of) or 0 for r in rows] or [0]))


def _histogram(metric: str, labels: Labels, values: Sequence[float]) -> Iterator[str]:
    known = [v for v in values if math.isfinite(v)]
    for limit in (*map(float, _BUCKETS), math.inf):
        yield _line(f"{metric}_bucket", {**labels, "le": _number(limit)}, sum(v <= limit for v in known))
    yield _line(f"{metric}_sum", labels, math.fsum(known))
    yield _line(f"{metric}_count", labels, len(known))


def _quantiles(metric: str, labels: Labels, values: Sequence[float]) -> Iterator[str]:
    """NaN wherever a figure is no number: an alert on a limit would not see it among the others."""
    if any(map(math.isnan, values)):
        yield from (_line(metric, {**labels, "quantile": f"{q:g}"}, math.nan) for q in _QUANTILES)
        return
    ordered = sorted(values)
    for q in _QUANTILES if ordered else ():
        yield _line(metric, {**labels, "quantile": f"{q:g}"}, ordered[round(q * (len(ordered) - 1))])


def _head(metric: str, kind: str, words: str) -> list[str]:
    return [f"# HELP {_PREFIX}{metric} {words}", f"# TYPE {_PREFIX}{metric} {kind}"]


def _line(metric: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
    return f"{_PREFIX}{metric}{{{inner}}} {_number(value)}" if inner else f"{_PREFIX}{metric} {_number(value)}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(int(value)) if value == int(value) else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
