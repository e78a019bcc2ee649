"""The certificate of a merged pipeline: which components were merged, and by which adapters; what was copied.

Each merged component has a certificate of its own in its folder, with every tensor. This one lies beside
model_index.json. `digest` is the SHA-256 of the document without it, written as this file is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from lora_export.checkpoint.adapter_files import adapter_hashes
from lora_export.contracts import AdapterFormat, MergeOptions
from lora_export.contracts.figures import Figure
from lora_export.contracts.option import kept
from lora_export.errors import InputError
from lora_export.merging.certificate.document import NAME, MergeTool, read_certificate
from lora_export.merging.pipelines.planning import PipelinePlan
from lora_export.storage.disk import regular_size
from lora_export.storage.documents import as_json, decode
from lora_export.storage.sealed import read_sealed, sha256, write_sealed
from lora_export.version import __version__

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ComponentRecord:
    """certificate_sha256: of the file in the component's folder; the rest is what that says."""

    class_name: str
    certificate_sha256: str
    tensors: Mapping[str, int]
    delta_survival: Figure | None


@dataclass(frozen=True)
class CopiedFile:
    """blake3: of the whole file."""

    size: int
    blake3: str


@dataclass(frozen=True)
class PipelineAdapter:
    """format: who writes such files; kinds: how many modules are of each; unchanged: weights whose update is zero;
    metadata: of the file, as far as it was looked at; sha256: of its files."""

    format: AdapterFormat
    weight: float
    kinds: Mapping[str, int]
    sha256: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    vectors: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineCertificate:
    """skipped: components that an adapter changes and that stayed as they are; unchanged: weights of the merged
    components whose update is zero; tokens: component → the tokens that its embedding and its tokenizer got, with
    their ids."""

    schema_version: int
    kind: Literal["pipeline"]
    tool: MergeTool
    class_name: str
    options: MergeOptions
    adapters: tuple[PipelineAdapter, ...]
    components: Mapping[str, ComponentRecord]
    skipped: tuple[str, ...]
    unchanged: tuple[str, ...]
    tokens: Mapping[str, Mapping[str, int]]
    files: Mapping[str, CopiedFile]

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = as_json(self) | {"options": kept(self.options)}
        return document


def is_merged_pipeline(folder: Path) -> bool:
    """Whether a folder has the certificate of a pipeline."""
    return (folder / NAME).is_file() and (folder / "model_index.json").is_file()


def read_pipeline_certificate(folder: Path) -> PipelineCertificate:
    """The certificate of a merged pipeline, its seal and types checked. InputError says what is wrong with it."""
    path = folder / NAME
    document = read_sealed(path)
    if document.get("kind") != "pipeline" or document.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"the certificate has the schema version {document.get('schema_version')!r}",
            where=path,
            expected=f"version {SCHEMA_VERSION} of the certificate of a pipeline",
            next_step="verify with the lora-export that wrote it",
        )
    certificate = decode(document, PipelineCertificate, "the certificate", path)
    if certificate.as_json() != document:
        raise InputError("the certificate is damaged", where=path, expected="the fields that this version writes")
    return certificate


def write_pipeline_certificate(stage: Path, planned: PipelinePlan) -> None:
    """Written last: it names every other file of the folder."""
    files = copied_files(stage, planned.components)
    write_sealed(stage / NAME, pipeline_certificate(stage, planned, files).as_json())


def pipeline_certificate(
    folder: Path, planned: PipelinePlan, files: Mapping[str, CopiedFile]
) -> PipelineCertificate:
    """What a certificate says of a folder that was merged as planned; component certificates are read.

    files: of `copied_files`.
    """
    assert planned.pipeline.class_name is not None
    recorded = {n: read_certificate(folder / n) for n in planned.components}
    return PipelineCertificate(
        schema_version=SCHEMA_VERSION,
        kind="pipeline",
        tool=MergeTool("lora-export", __version__),
        class_name=planned.pipeline.class_name,
        options=replace(planned.options, force=False),
        adapters=tuple(
            PipelineAdapter(
                a.format, c.weight, dict(sorted(a.kinds.items())), sha256_of_files(c.folder), a.metadata, a.vectors
            )
            for a, c in zip(planned.adapters, planned.choices, strict=True)
        ),
        components={
            n: ComponentRecord(
                planned.pipeline.components[n].class_name, sha256(folder / n / NAME), r.tensors, r.delta_survival
            )
            for n, r in recorded.items()
        },
        skipped=planned.skipped,
        unchanged=tuple(
            f"{n}: {t.name}"
            for n, r in recorded.items()
            for t in r.records
            if t.operation == "updated" and t.relative_delta == 0
        ),
        tokens=planned.tokens.ids(planned.components),
        files=files,
    )


def copied_files(folder: Path, merged: Mapping[str, object]) -> dict[str, CopiedFile]:
    """Every file of a pipeline but its certificate and the folders of merged components."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != NAME and name.partition("/")[0] not in merged:
            files[name] = CopiedFile(regular_size(path) or 0, blake3_of(path))
    return files


def blake3_of(path: Path) -> str:
    return str(blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest())


def sha256_of_files(adapter: Path) -> dict[str, str]:
    """By name, of a single file or of an adapter's folder."""
    if adapter.is_file():
        return {adapter.name: sha256(adapter)}
    return adapter_hashes(adapter, set(adapter.glob("*.safetensors")))
