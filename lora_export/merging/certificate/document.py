"""The record of a merge that stays with the merged folder: what happened to each tensor, and what survived.

Schema 2. `digest` is the SHA-256 of the document without it, written as this file is; `files` holds every other
file of the folder: SHA-256 and size, of a shard that of its header alone, for its tensors have their own hashes
(hashing.py). A digest can be made anew by whoever changes the document: `lora-export verify` makes all anew.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_export.checkpoint.shards import Shard, plan_shards
from lora_export.contracts import BaseCheck, MergeOptions, TensorRecord
from lora_export.contracts.figures import Figure
from lora_export.contracts.option import kept
from lora_export.errors import InputError
from lora_export.merging.planning.combine import ELECTING, RANDOM
from lora_export.merging.planning.plan import MergePlan
from lora_export.merging.running.audit import Auditor
from lora_export.storage.documents import as_json, decode
from lora_export.storage.sealed import hashed, read_sealed, write_sealed
from lora_export.version import __version__

NAME = "lora_export_certificate.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class MergeTool:
    name: str
    version: str


@dataclass(frozen=True)
class FileRecord:
    """A file of the folder: its size, and the SHA-256 of all of it, or of a shard that of its header."""

    size: int
    sha256: str | None = None
    header_sha256: str | None = None

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        file = hashed(path)
        return cls(file.size, file.sha256)


@dataclass(frozen=True)
class BaseFile:
    size: int


@dataclass(frozen=True)
class BaseFiles:
    files: Mapping[str, BaseFile]


@dataclass(frozen=True)
class AdapterRecord:
    """sha256: of each of its files; base_model: as the adapter names it; kind_from: the package that its kind is
    from, if it is not this one."""

    kind: str
    weight: float
    base_model: str | None
    sha256: Mapping[str, str]
    kind_from: str | None = None


@dataclass(frozen=True)
class AdapterTensors:
    used: int
    total: int


Files = Mapping[str, FileRecord]


@dataclass(frozen=True)
class Certificate:
    """unchecked: tensors that were not computed again → why. options: those that did not matter have their
    defaults."""

    schema_version: int
    tool: MergeTool
    versions: Mapping[str, str]
    arithmetic: str
    bound: str
    options: MergeOptions
    base: BaseFiles
    adapters: tuple[AdapterRecord, ...]
    tensors: Mapping[str, int]
    adapter_tensors: AdapterTensors
    delta_survival: Figure | None
    base_checks: tuple[BaseCheck, ...]
    files: Files
    unchecked: Mapping[str, str]
    records: tuple[TensorRecord, ...]

    @property
    def hashes(self) -> dict[str, str | None]:
        """Of every tensor of the output, by name."""
        return {r.name: r.hash_out for r in self.records}

    @property
    def touched(self) -> tuple[str, ...]:
        """The tensors that adapters changed or brought."""
        return tuple(r.name for r in self.records if r.operation in ("updated", "replaced"))

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = as_json(self) | {"options": kept(self.options)}
        for name, file in document["files"].items():
            document["files"][name] = {k: v for k, v in file.items() if v is not None}
        for adapter in document["adapters"]:
            if adapter["kind_from"] is None:
                del adapter["kind_from"]
        return document


def read_certificate(folder: Path) -> Certificate:
    """The certificate of a folder, its seal and types checked. InputError says what is wrong with it."""
    path = folder / NAME
    document = read_sealed(path)
    schema = document.get("schema_version")
    if schema != SCHEMA_VERSION:
        raise InputError(
            f"the certificate has schema version {schema!r}",
            where=path,
            expected=f"version {SCHEMA_VERSION}",
            next_step="verify with the lora-export that wrote it",
        )
    certificate = decode(document, Certificate, "the certificate", path)
    again = certificate.as_json()
    if again != document:
        odd = next((n for n in [*document, *again] if document.get(n) != again.get(n)), "")
        raise InputError(
            f"the certificate is damaged: {odd} has other fields than a certificate of a merge",
            where=path,
            expected="the fields that this version writes",
        )
    return certificate


def write_certificate(stage: Path, audit: Auditor, checks: Sequence[BaseCheck]) -> None:
    """The certificate of a finished merge, written last: it names every other file."""
    shards = describe_shards(audit.plan)
    files = dict(sorted({**describe_files(stage, shards), **shards}.items()))
    write_sealed(stage / NAME, certificate_of(audit, checks, files).as_json())


def certificate_of(audit: Auditor, checks: Sequence[BaseCheck], files: Files) -> Certificate:
    """files: of `describe_files`."""
    plan = audit.plan
    used = sum(a.tensor_count for a in plan.adapters)
    inputs = sorted({t.file: t.source for t in plan.base.tensors.values()}.items(), key=lambda item: item[0])
    return Certificate(
        schema_version=SCHEMA_VERSION,
        tool=MergeTool("lora-export", __version__),
        versions=versions(plan),
        arithmetic="fp32, or float64 for fp32 and image models; rounded once to the output type, ties to even",
        bound="½ ulp + 2⁻²⁰·(|W| + s·|B|·|A|) from float64; hashes of tensors: BLAKE3 of leaves of 2^18 bytes",
        options=effective_options(plan),
        base=BaseFiles({file.name: BaseFile(source.file_size(file)) for file, source in inputs}),
        adapters=tuple(
            AdapterRecord(
                a.kind,
                a.weight,
                _name(a.config.get("base_model_name_or_path")),
                hashes,
                a.plugin,
            )
            for a, hashes in zip(plan.adapters, audit.adapter_hashes, strict=True)
        ),
        tensors=plan.counts,
        adapter_tensors=AdapterTensors(used, used),
        delta_survival=audit.survival,
        base_checks=tuple(checks),
        files=files,
        unchecked=dict(sorted(audit.unchecked.items())),
        records=tuple(audit.records),
    )


def versions(plan: MergePlan) -> dict[str, str]:
    """What the bits of a merge depend on besides its inputs: the same versions give the same bytes."""
    packages = {"python": platform.python_version(), "torch": version("torch")}
    return packages | {"processor": _processor()} if plan.computes else packages


def _processor() -> str:
    """The vector unit and the vendor, by which torch and its libraries choose how they add up."""
    import torch

    vendor = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        vendor = next((x.partition(":")[2].strip() for x in lines if x.startswith("vendor_id")), "")
    return " ".join(filter(None, (platform.machine(), torch.backends.cpu.get_cpu_capability(), vendor)))


def effective_options(plan: MergePlan) -> MergeOptions:
    """The options of a merge. One that did not matter has its default: no other value of it can be claimed."""
    options, tensors = plan.options, plan.tensors.values()
    as_the_base = plan_shards([t.output for t in tensors], None, {}, plan.base.files)
    matters = {
        "force": False,
        "variant": bool(plan.base.files.variant),
        "skip": False,
        "base_weights": any(t.quantized for t in tensors) or options.training_quantization != "none",
        "training_double_quant": options.training_quantization in ("nf4", "fp4"),
        "task": plan.model is not None and plan.model.asked,
        "seed": options.combine in RANDOM,
        "majority_sign": options.combine in ELECTING,
        "max_shard_size": _grouping(plan.shards) != _grouping(as_the_base),
    }
    if not any(u.kind == "lora_experts" for t in tensors for u in t.updates):
        matters |= {"expert_packing": False, "expert_layout": False}
    default = asdict(MergeOptions())
    return replace(options, **{name: default[name] for name, does in matters.items() if not does})


def _grouping(shards: Sequence[Shard]) -> list[tuple[str, tuple[str, ...]]]:
    return [(s.file, tuple(t.name for t in s.tensors)) for s in shards]


def describe_files(folder: Path, shards: Files) -> Files:
    """Every file of a folder but the certificate and the shards."""
    names = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: FileRecord.of(p) for n, p in names.items() if n != NAME and n not in shards}


def describe_shards(plan: MergePlan) -> Files:
    return {
        s.file: FileRecord(
            size=len(s.header) + sum(t.nbytes for t in s.tensors),
            header_sha256=hashlib.sha256(s.header).hexdigest(),
        )
        for s in plan.shards
    }


def _name(base_model: object) -> str | None:
    """A hub id as it is; a folder of the training machine by its last name, as the certificate travels."""
    text = str(base_model or "")
    return (Path(text).name if Path(text).is_absolute() else text) or None
