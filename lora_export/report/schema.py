"""report.json: what it must hold, read back with distrust."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputError
from lora_export.storage import documents
from lora_export.storage.documents import FIGURE, Kind
from lora_export.storage.sealed import read_json

SCHEMA_VERSION = 1
STATUSES = ("passed", "failed")
REPORT, SAMPLES, HTML, MARKDOWN = "report.json", "samples.json", "report.html", "report.md"
CONDITIONS = "conditions.json"
_NUMBER: Kind = (None, FIGURE)
_TEXT: Kind = (None, str)
_RECORD: Kind = {
    "name": str, "operation": str, "relative_delta": _NUMBER, "survival": _NUMBER, "kinds?": [str],
    "max_ulps?": _NUMBER, "mean_ulps?": _NUMBER, "checked?": int, "saturated?": int,
    "hash_in?": _TEXT, "hash_out?": _TEXT,
}  # fmt: skip
_BASE_CHECK: Kind = {"name": str, "outcome": str, "note": str}
_MERGE: Kind = {
    "tensors": {str: int}, "adapter_tensors": {"used?": int, "total?": int}, "records": [_RECORD],
    "warnings?": (None, [str]), "base_checks?": (None, [_BASE_CHECK]),
    "delta_survival?": _NUMBER, "dtype?": _TEXT, "base_weights?": _TEXT,
    "seconds?": _NUMBER, "peak_rss_bytes?": _NUMBER,
}  # fmt: skip
_CHECK: Kind = {"name": str, "value": _NUMBER, "threshold": _NUMBER, "passed": bool, "note?": _TEXT}
_VALIDATE: Kind = {
    "passed": bool, "checks": [_CHECK], "samples": [dict], "kl_by_position": [_NUMBER],
    "weight_errors?": (None, [str]),
    "perplexities?": (None, [{"model": str, "value": _NUMBER, "tokens": int}]),
    "deviation?": (None, {"module": str, "value": _NUMBER, "floor": _NUMBER, "tensors": [str]}),
    "adapter_survival?": (None, [{"model": str, "share": _NUMBER, "kl_base": _NUMBER, "kl_lost": _NUMBER}]),
    "bases?": (None, [{"base": str, "perplexity": _NUMBER, "kl_trained": _NUMBER}]), "advice?": (None, [str]),
    "seed?": (None, int), "unused_updates?": (None, [str]),
}  # fmt: skip
_EXPORT: Kind = {"engine": str, "precision": str, "nodes": int, "files": {str: int}, "seconds?": _NUMBER}
_PERCENTILE: Kind = {"ms": _NUMBER, "low": _NUMBER, "high": _NUMBER}
_ARM: Kind = {
    "p50": _PERCENTILE, "p95": _PERCENTILE, "p99": _PERCENTILE, "tokens_per_second": _NUMBER,
    "first_token_ms": _NUMBER, "memory_bytes": (None, int), "ratio": _NUMBER, "ci_low": _NUMBER, "ci_high": _NUMBER,
}  # fmt: skip
_GRAPH: Kind = {
    "identical": bool, "base_sha256": str, "merged_sha256": str, "nodes": int, "placement": {str: int},
    "differences": [str], "warnings": [str],
}  # fmt: skip
_CELL: Kind = {
    "batch": int, "prompt": int, "phase": str, "cuda_graph": bool, "verdict": str,
    "merged_ms": float, "pairs?": (None, int),
    **dict.fromkeys(("base_ms", "unmerged_ms", "ratio", "ci_low", "ci_high", "noise_floor"), _NUMBER),
    **dict.fromkeys(("unmerged_ratio", "unmerged_ci_low", "unmerged_ci_high"), _NUMBER),
    "kv_in_place?": bool, "sessions?": int, "control?": _TEXT, "reason?": _TEXT, "arms?": {str: _ARM},
}  # fmt: skip
_BENCHMARK: Kind = {
    "provider": str, "provider_verified": bool, "cells": [_CELL], "verdict": str, "notes": [str],
    "graph?": (None, _GRAPH),
    "graph_identical?": (None, bool), "graph_differences?": (None, [str]), "noise_floor?": _NUMBER,
    "seconds?": _NUMBER, "environment?": (None, {"margin?": _NUMBER}),
}  # fmt: skip
REPORT_KIND: Kind = {
    "schema_version": int, "title": str, "created": str, "tool_version": str, "status": str, "options": dict,
    "sources": {"adapters?": (None, list)}, "merge": (None, _MERGE), "validate": (None, _VALIDATE),
    "export": (None, _EXPORT), "benchmark": (None, _BENCHMARK),
}  # fmt: skip
_SAMPLES: Kind = {str: {str: [FIGURE]}}


def load(folder: Path) -> dict[str, Any]:
    """The checked report.json of a report folder, in which figures are numbers, NaN and infinity too.

    InputError says what is wrong with it.
    """
    path = folder / REPORT
    if not path.is_file():
        raise InputError(
            "there is no report here",
            where=path,
            expected="the report folder of a finished run",
            next_step="lora-export merge-and-export, which writes one",
        )
    report = read_json(path)
    check(report, path)
    found: dict[str, Any] = documents.with_numbers(report, REPORT_KIND)
    return found


def load_samples(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Raw latencies: cell → arm → milliseconds; empty where a run was not benchmarked."""
    path = folder / SAMPLES
    if not path.is_file():
        return {}
    cells = read_json(path)
    documents.check(cells, _SAMPLES, "the file of samples", path)
    found: dict[str, dict[str, list[float]]] = documents.with_numbers(cells, _SAMPLES)
    return found


def check(report: Mapping[str, Any], where: Path) -> None:
    """Raise InputError unless the report is complete and of this version."""
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"the report has schema version {version!r}",
            where=where,
            expected=f"version {SCHEMA_VERSION}, which this lora-export writes and reads",
            next_step="use the lora-export that wrote it, or run again",
        )
    documents.check_texts(report, where)
    documents.check(report, REPORT_KIND, "the report", where)
    if report["status"] not in STATUSES:
        raise InputError(f"status is {report['status']!r}", where=where, expected=" or ".join(STATUSES))
