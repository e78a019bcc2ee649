"""The record of a merge that stays with the merged folder: what happened to each tensor, and what survived."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_export.contracts import BaseCheck, TensorRecord
from lora_export.files import sha256, write_json
from lora_export.merge.plan import MergePlan

NAME = "lora_export_certificate.json"


def write_certificate(
    folder: Path,
    plan: MergePlan,
    records: Sequence[TensorRecord],
    survival: float | None,
    checks: Sequence[BaseCheck],
) -> None:
    """JSON beside the weights: options, hashes of inputs, and a record for each tensor."""
    used = sum(a.tensor_count for a in plan.adapters)
    inputs = sorted({t.file for t in plan.base.tensors.values()})
    certificate: dict[str, Any] = {
        "schema_version": 1,
        "tool": {"name": "lora-export", "version": version("lora-export")},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "arithmetic": "fp32, rounded once to the output type (round to nearest, ties to even)",
        "options": asdict(plan.options) | {"force": None},
        "base": {"files": {p.name: {"size": p.stat().st_size} for p in inputs}},
        "adapters": [
            {
                "kind": a.kind,
                "base_model": _name(a.config.get("base_model_name_or_path")),
                "sha256": {p.name: sha256(p) for p in sorted(a.folder.glob("adapter_*")) if p.is_file()},
            }
            for a in plan.adapters
        ],
        "tensors": plan.counts,
        "adapter_tensors": {"used": used, "total": used},
        "delta_survival": survival,
        "base_checks": [asdict(c) for c in checks],
        "records": [asdict(r) for r in records],
    }
    del certificate["options"]["force"]
    write_json(folder / NAME, certificate)


def _name(base_model: object) -> str | None:
    """A hub id as it is; a folder of the training machine by its last name, as the certificate travels."""
    text = str(base_model or "")
    return (Path(text).name if Path(text).is_absolute() else text) or None
