"""manifest.json of a package: every file by size and SHA-256, what it was made of, and what proves it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.contracts import Finding
from lora_export.errors import InputError
from lora_export.manifest import same_files
from lora_export.packages import bom, readme
from lora_export.packages.job import Facts, Run, Sample
from lora_export.packages.targets import TARGETS
from lora_export.packages.targets.genai import SUFFIX
from lora_export.packages.tasks import task_of
from lora_export.storage import sealed
from lora_export.storage.documents import Kind, as_json, check, check_texts
from lora_export.version import __version__

NAME, SIGNATURE = "manifest.json", "model.sig"
KIND = "lora-export package"
MODEL_NAME_WORDS = "letters, digits, '.', '_' and '-', the first a letter or a digit, at most 100"
_LATENCY = ("verdict", "provider", "provider_verified", "graph_identical")
_HASHES: Kind = {str: {"sha256": str, "size": int}}
_MANIFEST: Kind = {
    "schema_version": int, "kind": str, "base": {"name": str}, "adapters": [{"name": str}],
    "latency": {"verdict": (None, str)}, "target": str, "name": str, "files": _HASHES, "task": str,
    "architecture": str, "precision": str, "variants": [str], "providers": [str], "onnx_adapters": [str],
    "sample": (None, {"prompt": str, "text": (None, str), "numbers": [float]}),
}  # fmt: skip


def write(
    stage: Path,
    run: Run,
    facts: Facts,
    options: Mapping[str, Any],
    measured: Mapping[str, Any],
    hashes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Of everything in `stage`, whose hashes are given.

    measured: what each variant was found to do beside the run's own export.
    """
    bench = run.report.benchmark
    sealed.write_sealed(
        stage / NAME,
        {
            "schema_version": 1,
            "kind": KIND,
            "target": facts.target,
            "name": facts.name,
            "task": run.task.name,
            "architecture": run.architecture,
            **readme.facts_json(facts),
            "tool": {"name": "lora-export", "version": __version__},
            "versions": run.manifest["versions"],
            "options": {"package": dict(options), "run": run.manifest["options"]},
            "base": run.manifest["base"],
            "adapters": run.manifest["adapters"],
            "run": {
                "title": run.report.title,
                "created": run.report.created,
                "status": run.report.status,
                "manifest_sha256": sealed.sha256(run.folder / NAME),
            },
            "certificate": _certificate(run),
            "validation": {
                "passed": run.validation.passed,
                "checks": as_json(run.validation.checks),
            },
            "latency": {name: getattr(bench, name, None) for name in _LATENCY},
            "measured": dict(measured),
            "files": dict(sorted(hashes.items())),
        },
    )


def _certificate(run: Run) -> dict[str, Any]:
    """The certificate of the merge by its hash, and its summary."""
    merge = as_json(run.merge)
    return {
        "sha256": run.manifest["files"].get(merge["certificate"], {}).get("sha256"),
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


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a package. InputError unless it is whole and names files within the folder."""
    path = folder / NAME
    manifest = sealed.read_sealed(path)
    check_texts(manifest, path)
    check(manifest, _MANIFEST, "the manifest of the package", path)
    for name in manifest["files"]:
        if not sealed.plain_path(name):
            raise InputError(
                f"the manifest names {name!r}, which lies outside of the package",
                where=path,
                expected="relative names within the folder",
            )
    _check_words(manifest, path)
    return manifest


def _check_words(manifest: Mapping[str, Any], path: Path) -> None:
    """InputError unless what ends in a program or in a path is one of the words that a package can have."""
    adapters = [f"{name}{SUFFIX}" for name in manifest["onnx_adapters"]]
    for what, holds, expected in (
        ("target", manifest["target"] in TARGETS, ", ".join(TARGETS)),
        ("name", is_model_name(manifest["name"]), MODEL_NAME_WORDS),
        ("providers", {*manifest["providers"]} in ({"cpu"}, {"cuda"}, {"cpu", "cuda"}), "cpu, cuda"),
        ("variants", all(map(str.isalnum, manifest["variants"])), "letters and digits"),
        ("onnx_adapters", all(name in manifest["files"] for name in adapters), "files of the package"),
    ):
        if not holds:
            raise InputError(
                f"the manifest of the package says {what} {manifest[what]!r}", where=path, expected=expected
            )


def is_model_name(name: str) -> bool:
    """Whether a name is one of a file, of a model of Triton's, and a title."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None


def facts_of(folder: Path, manifest: Mapping[str, Any]) -> Facts:
    """What running a package takes. InputError for a configuration that cannot be read."""
    sample = manifest["sample"]
    return Facts(
        target=manifest["target"],
        name=manifest["name"],
        task=task_of(manifest["task"], manifest["architecture"]),
        precision=manifest["precision"],
        variants=tuple(manifest["variants"]),
        providers=tuple(manifest["providers"]),
        sample=Sample(sample["prompt"], sample["text"], tuple(sample["numbers"])) if sample else None,
        config=sealed.read_json(folder / "config.json"),
        adapters=tuple(manifest["onnx_adapters"]),
    )


def compare(folder: Path, manifest: Mapping[str, Any]) -> list[Finding]:
    """Each file that is missing, was added, was changed, or is no plain file; or that all are as they were."""
    wanted, found = manifest["files"], {}
    notes = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            notes.append(f"{name} is a link, or no file")
        elif path.is_file() and name not in (NAME, SIGNATURE):
            found[name] = sealed.hashed(path)
        elif path.is_dir() and not any(w.startswith(f"{name}/") for w in wanted):
            notes.append(f"{name}/ was added")
    return same_files("package_files", wanted, found, notes)
