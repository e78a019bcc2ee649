"""manifest.json of a package: every file by size and SHA-256, its inputs, and what proves it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_export.contracts import Finding
from lora_export.errors import InputError
from lora_export.manifest import RecordedAdapter, RecordedSource, Tool, same_files
from lora_export.packages import bom, gguf
from lora_export.packages.job import ADAPTER_SUFFIX, PackageFacts, Run, Sample
from lora_export.packages.pipelines import laying
from lora_export.packages.targets import target_named
from lora_export.packages.tasks import task_of
from lora_export.storage import sealed
from lora_export.storage.documents import as_json, decode
from lora_export.storage.sealed import FileHash

NAME, SIGNATURE = "manifest.json", "model.sig"
KIND = "lora-export package"
MODEL_NAME_WORDS = "letters, digits, '.', '_' and '-', the first a letter or a digit, at most 100"


@dataclass(frozen=True)
class Latency:
    """Of the merged model against its base, as the run measured it."""

    verdict: str | None
    provider: str | None = None
    provider_verified: bool | None = None
    graph_identical: bool | None = None


@dataclass(frozen=True)
class PackageManifest:
    """onnx_adapters: the .onnx_adapter files without their suffix; options: of the package, and of the run; run:
    its title, time, status and the hash of its manifest; certificate: of the merge, by hash, and its summary;
    measured: how each variant compares with the run's own export; files: everything else in the package."""

    schema_version: int
    kind: str
    target: str
    name: str
    task: str
    architecture: str
    precision: str
    variants: tuple[str, ...]
    providers: tuple[str, ...]
    onnx_adapters: tuple[str, ...]
    sample: Sample | None
    tool: Tool
    versions: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]]
    base: RecordedSource
    adapters: tuple[RecordedAdapter, ...]
    run: Mapping[str, Any]
    certificate: Mapping[str, Any]
    validation: Mapping[str, Any]
    latency: Latency
    measured: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, FileHash]


def write(
    stage: Path,
    run: Run,
    facts: PackageFacts,
    options: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, FileHash],
) -> None:
    """Of everything in `stage`, whose hashes are given."""
    bench = run.report.benchmark
    manifest = PackageManifest(
        schema_version=1,
        kind=KIND,
        target=facts.target.name,
        name=facts.name,
        task=run.task.name,
        architecture=run.architecture,
        precision=facts.precision,
        variants=facts.variants,
        providers=facts.providers,
        onnx_adapters=facts.adapters,
        sample=facts.sample,
        tool=Tool(),
        versions=run.manifest.versions,
        options={"package": options, "run": run.manifest.options},
        base=run.manifest.base,
        adapters=run.manifest.adapters,
        run={
            "title": run.report.title,
            "created": run.report.created,
            "status": run.report.status,
            "manifest_sha256": sealed.sha256(run.folder / NAME),
        },
        certificate=_certificate(run),
        validation={"passed": run.validation.passed, "checks": run.validation.checks},
        latency=Latency(*(getattr(bench, f.name, None) for f in fields(Latency))),
        measured=measured,
        files=dict(sorted(hashes.items())),
    )
    sealed.write_sealed(stage / NAME, _document(manifest))


def _document(manifest: PackageManifest) -> dict[str, Any]:
    """As JSON, without what only a picture has."""
    document: dict[str, Any] = as_json(manifest)
    sample = document["sample"]
    if sample is not None and sample["drawing"] is None:
        del sample["drawing"]
    return document


def _certificate(run: Run) -> dict[str, Any]:
    merge = as_json(run.merge)
    file = run.manifest.files.get(merge["certificate"])
    return {
        "sha256": file.sha256 if file else None,
        **{k: merge[k] for k in ("tensors", "adapter_tensors", "delta_survival", "base_weights", "dtype")},
    }


def is_package(folder: Path) -> bool:
    """Whether this is the folder of a package, even if one of its files is damaged or missing."""
    path = folder / NAME
    if (folder / bom.NAME).is_file():
        return True
    try:
        return path.is_file() and sealed.read_json(path).get("kind") == KIND
    except InputError:
        return False


def read(folder: Path) -> PackageManifest:
    """The manifest of a package. InputError unless it is whole and names files within the folder."""
    path = folder / NAME
    manifest = decode(sealed.read_sealed(path), PackageManifest, "the manifest of the package", path)
    outside = next((name for name in manifest.files if not sealed.plain_path(name)), None)
    if outside is not None:
        raise InputError(
            f"the manifest names {outside!r}, which lies outside the package",
            where=path,
            expected="relative names within the folder",
        )
    _check_words(manifest, path)
    return manifest


def _check_words(manifest: PackageManifest, path: Path) -> None:
    """InputError for a word that no package has and that would end up in a program or a path."""
    target_named(manifest.target)
    adapters = [f"{name}{ADAPTER_SUFFIX}" for name in manifest.onnx_adapters]
    for what, holds, expected in (
        ("name", is_model_name(manifest.name), MODEL_NAME_WORDS),
        ("providers", {*manifest.providers} in ({"cpu"}, {"cuda"}, {"cpu", "cuda"}), "cpu, cuda"),
        ("variants", all(re.fullmatch(r"\w+", v, re.ASCII) for v in manifest.variants), "letters, digits and '_'"),
        ("onnx_adapters", all(name in manifest.files for name in adapters), "files of the package"),
    ):
        if not holds:
            value = as_json(getattr(manifest, what))
            raise InputError(f"the manifest of the package says {what} {value!r}", where=path, expected=expected)


def is_model_name(name: str) -> bool:
    """Whether a name can be that of a file, of a Triton model, and a title."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None


def facts_of(folder: Path, manifest: PackageManifest) -> PackageFacts:
    """What running a package takes. InputError for a configuration that cannot be read."""
    task = task_of(manifest.task, manifest.architecture)
    return PackageFacts(
        target=target_named(manifest.target),
        name=manifest.name,
        task=task,
        precision=manifest.precision,
        variants=manifest.variants,
        providers=manifest.providers,
        sample=manifest.sample,
        config=sealed.read_json(folder / (laying.INDEX if task.draws else "config.json")),
        adapters=manifest.onnx_adapters,
        weights=laying.weights_of(manifest.files),
        backend=str(manifest.options.get("package", {}).get("backend") or ""),
        lora=gguf.lora_file(manifest.name) in manifest.files,
    )


def compare(folder: Path, manifest: PackageManifest) -> list[Finding]:
    """Each file that is missing, was added, was changed, or is not a regular file; or that all are as they were."""
    wanted, actual = manifest.files, {}
    notes = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            notes.append(f"{name} is a link, or not a file")
        elif path.is_file() and name not in (NAME, SIGNATURE):
            actual[name] = sealed.hashed(path)
        elif path.is_dir() and not any(w.startswith(f"{name}/") for w in wanted):
            notes.append(f"{name}/ was added")
    return same_files("package_files", wanted, actual, notes)
