"""The record of a merge that stays with the merged folder: what happened to each tensor, and what survived.

Schema 2. `digest` is the SHA-256 of the document without it, written as this file is; `files` holds every other
file of the folder: SHA-256 and size, of a shard that of its header alone, for its tensors have their own hashes
(hashing.py). A digest can be made anew by whoever changes the document: `lora-export verify` makes all anew.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_export.checkpoint.shards import Shard, plan_shards
from lora_export.contracts import BaseCheck, TensorRecord
from lora_export.contracts.option import kept
from lora_export.merging.planning.plan import MergePlan
from lora_export.merging.planning.recipe import ELECTING, RANDOM
from lora_export.storage.documents import finite
from lora_export.storage.sealed import sha256
from lora_export.version import __version__

NAME = "lora_export_certificate.json"
SCHEMA_VERSION = 2

Files = dict[str, dict[str, Any]]


def certificate_of(
    plan: MergePlan,
    weights: Sequence[float],
    records: Sequence[TensorRecord],
    survival: float | None,
    checks: Sequence[BaseCheck],
    unchecked: Mapping[str, str],
    files: Files,
) -> dict[str, Any]:
    """The document. weights: of the adapters; unchecked: tensors that were not computed again → why; files: of
    `describe_files`."""
    used = sum(a.tensor_count for a in plan.adapters)
    inputs = sorted({t.file for t in plan.base.tensors.values()})
    found = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "lora-export", "version": __version__},
        "versions": versions(plan),
        "arithmetic": "fp32, or float64 where fp32 is written; rounded once to the output type, ties to even",
        "bound": "½ ulp + 2⁻²⁰·(|W| + s·|B|·|A|) from float64; hashes of tensors: BLAKE3 of leaves of 2^18 bytes",
        "options": effective_options(plan),
        "base": {"files": {p.name: {"size": p.stat().st_size} for p in inputs}},
        "adapters": [
            {
                "kind": a.kind,
                "weight": weight,
                "base_model": _name(a.config.get("base_model_name_or_path")),
                "sha256": adapter_hashes(a.folder, {t.file for t in a.tensors.values()}),
            }
            for a, weight in zip(plan.adapters, weights, strict=True)
        ],
        "tensors": plan.counts,
        "adapter_tensors": {"used": used, "total": used},
        "delta_survival": survival,
        "base_checks": [asdict(c) for c in checks],
        "files": files,
        "unchecked": dict(sorted(unchecked.items())),
        "records": [asdict(r) for r in records],
    }
    document: dict[str, Any] = finite(found)  # --allow-nonfinite may lead to figures that are no numbers
    return document


def versions(plan: MergePlan) -> dict[str, str]:
    """What the bits of a merge depend on besides its inputs: the same versions give the same bytes."""
    found = {"python": platform.python_version(), "torch": version("torch")}
    return found | {"processor": _processor()} if plan.computes else found


def _processor() -> str:
    """The vector unit and the vendor, by which torch and its libraries choose how they add up."""
    import torch

    vendor = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        vendor = next((x.partition(":")[2].strip() for x in lines if x.startswith("vendor_id")), "")
    return " ".join(filter(None, (platform.machine(), torch.backends.cpu.get_cpu_capability(), vendor)))


def effective_options(plan: MergePlan) -> dict[str, Any]:
    """The options of a merge. One that did not matter has its default: no other value of it can be claimed."""
    options = asdict(plan.options)
    tensors = plan.tensors.values()
    matters = {
        "base_weights": any(t.quantized for t in tensors) or options["training_quantization"] != "none",
        "training_double_quant": options["training_quantization"] in ("nf4", "fp4"),
        "task": plan.model is not None and plan.model.asked,
        "seed": options["combine"] in RANDOM,
        "majority_sign": options["combine"] in ELECTING,
        "max_shard_size": _grouping(plan.shards) != _grouping(plan_shards([t.output for t in tensors], None, {})),
    }
    if not any(u.kind == "lora_experts" for t in tensors for u in t.updates):
        matters |= {"expert_packing": False, "expert_layout": False}
    return kept(plan.options, default=[name for name, does in matters.items() if not does])


def _grouping(shards: Sequence[Shard]) -> list[tuple[str, tuple[str, ...]]]:
    return [(s.file, tuple(t.name for t in s.tensors)) for s in shards]


def describe_files(folder: Path, shards: Files) -> Files:
    """Every file of a folder but the certificate and the shards."""
    found: Files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != NAME and name not in shards:
            found[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return found


def describe_shards(plan: MergePlan) -> Files:
    return {
        s.file: {
            "size": len(s.header) + sum(t.nbytes for t in s.tensors),
            "header_sha256": hashlib.sha256(s.header).hexdigest(),
        }
        for s in plan.shards
    }


def adapter_hashes(folder: Path, used: set[Path]) -> dict[str, str]:
    """SHA-256 of an adapter's files: those that its tensors are in, and whatever is called adapter_…."""
    return {p.name: sha256(p) for p in sorted({*folder.glob("adapter_*"), *used}) if p.is_file()}


def _name(base_model: object) -> str | None:
    """A hub id as it is; a folder of the training machine by its last name, as the certificate travels."""
    text = str(base_model or "")
    return (Path(text).name if Path(text).is_absolute() else text) or None
