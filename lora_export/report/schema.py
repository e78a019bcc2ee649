"""report.json: what it must hold, read back with distrust."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputError
from lora_export.files import read_json

SCHEMA_VERSION = 1
REPORT, SAMPLES, HTML, MARKDOWN = "report.json", "samples.json", "report.html", "report.md"
STAGES = ("merge", "validate", "export", "benchmark")

_Kind = type | tuple[type, ...]
_NUMBER: _Kind = (int, float)
_MAYBE_NUMBER: _Kind = (int, float, type(None))
_MAYBE_TEXT: _Kind = (str, type(None))

_TOP: dict[str, _Kind] = {
    "schema_version": int,
    "title": str,
    "created": str,
    "tool_version": str,
    "status": str,
    "options": dict,
    "sources": dict,
    **dict.fromkeys(STAGES, (dict, type(None))),
}
_STAGE_FIELDS: dict[str, dict[str, _Kind]] = {
    "merge": {"tensors": dict, "adapter_tensors": dict, "records": list},
    "validate": {"passed": bool, "checks": list, "samples": list, "kl_by_position": list},
    "export": {"engine": str, "precision": str, "nodes": int, "files": dict},
    "benchmark": {
        "provider": str,
        "provider_verified": bool,
        "cells": list,
        "verdict": str,
        "notes": (list, tuple),
    },
}
# (stage, list) → the fields of each entry
_ENTRIES: dict[tuple[str, str], dict[str, _Kind]] = {
    ("merge", "records"): {
        "name": str,
        "operation": str,
        "relative_delta": _MAYBE_NUMBER,
        "survival": _MAYBE_NUMBER,
    },
    ("validate", "checks"): {"name": str, "value": _MAYBE_NUMBER, "threshold": _MAYBE_NUMBER, "passed": bool},
    ("validate", "samples"): {},
    ("benchmark", "cells"): {
        "batch": int,
        "prompt": int,
        "phase": str,
        "cuda_graph": bool,
        "verdict": str,
        "merged_ms": _NUMBER,
        **dict.fromkeys(("base_ms", "unmerged_ms", "ratio", "ci_low", "ci_high", "noise_floor"), _MAYBE_NUMBER),
        **dict.fromkeys(("unmerged_ratio", "unmerged_ci_low", "unmerged_ci_high"), _MAYBE_NUMBER),
    },
}


def load(folder: Path) -> dict[str, Any]:
    """The checked report.json of a report folder; InputError says what is wrong with it."""
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
    return report


def load_samples(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Raw latencies: cell → arm → milliseconds; empty where a run was not benchmarked."""
    path = folder / SAMPLES
    if not path.is_file():
        return {}
    cells = read_json(path)
    for key, arms in cells.items():
        good = isinstance(arms, dict) and all(
            isinstance(times, list) and all(_is(t, _NUMBER) for t in times) for times in arms.values()
        )
        if not good:
            raise InputError(f"the samples of {key!r} are damaged", where=path, expected="lists of milliseconds")
    return cells


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
    _check_fields(report, _TOP, "the report", where)
    if report["status"] not in ("passed", "failed"):
        raise InputError(f"status is {report['status']!r}", where=where, expected="passed or failed")
    for stage, fields in _STAGE_FIELDS.items():
        if report[stage] is not None:
            _check_fields(report[stage], fields, stage, where)
    for (stage, name), fields in _ENTRIES.items():
        for i, entry in enumerate((report[stage] or {}).get(name, [])):
            _check_fields(entry, fields, f"{stage}.{name}[{i}]", where)


def _check_fields(value: Any, fields: Mapping[str, _Kind], what: str, where: Path) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is damaged: no JSON object", where=where)
    for name, kind in fields.items():
        if name not in value:
            raise InputError(f"{what} is damaged: {name} is missing", where=where)
        if not _is(value[name], kind):
            raise InputError(f"{what} is damaged: {name} is {type(value[name]).__name__}", where=where)


def _is(value: Any, kind: _Kind) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def finite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
