"""manifest.json: what a run was made from and what it left, by size and SHA-256; written, and checked again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.contracts import AdapterChoice, Finding, MergeOptions, Source
from lora_export.contracts.option import names
from lora_export.errors import InputError
from lora_export.storage.documents import Kind, check
from lora_export.storage.sealed import hash_folder, hashed, read_json, read_sealed, write_sealed
from lora_export.version import __version__

NAME = "manifest.json"
_HASHES: Kind = {str: {"sha256": str, "size": int}}
_WRITTEN = {f"report/report.{kind}" for kind in ("json", "html", "md")} | {
    "report/samples.json", "report/conditions.json", "lora_export_certificate.json",
}  # fmt: skip
_FIELDS: Kind = {
    "schema_version": int, "options": {"merge": dict, "precision?": str, "quantization?": dict},
    "files": _HASHES, "base": {"files": _HASHES},
    "adapters": [{"weight": float, "files": _HASHES}],
}  # fmt: skip


def write(stage: Path, base: Source, adapters: Sequence[AdapterChoice], options: Mapping[str, Any]) -> None:
    """Of everything in `stage`, sealed with its own digest. options: as the report keeps them."""
    write_sealed(
        stage / NAME,
        {
            "schema_version": 1,
            "tool": {"name": "lora-export", "version": __version__},
            "versions": versions(),
            "options": dict(options),
            "base": named(base) | {"files": _input_hashes(base.folder)},
            "adapters": [
                named(a.source) | {"weight": a.weight, "files": _input_hashes(a.folder)} for a in adapters
            ],
            "files": hash_folder(stage),
        },
    )


def is_run(folder: Path) -> bool:
    """Whether merge-and-export left this folder, with a merged model or without."""
    return (folder / NAME).is_file() and any((folder / name).is_dir() for name in ("merged", "onnx"))


def _input_hashes(folder: Path) -> dict[str, Any]:
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json") and p.is_file())
    return {p.name: hashed(p) for p in paths}


def versions() -> dict[str, str]:
    """Installed versions of what the results depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    names = (
        "torch", "transformers", "peft", "bitsandbytes", "safetensors", "onnx", "onnxscript",
        "onnxruntime-gpu", "onnxruntime", "onnxruntime-genai-cuda", "onnxruntime-genai", "optimum",
    )  # fmt: skip
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def named(source: Source) -> dict[str, Any]:
    """A folder by its last name only: a report travels, and the rest of a path is nobody's business."""
    hub = source.commit is not None
    return {"name": source.name if hub else source.folder.resolve().name, "commit": source.commit}


def verify(run: Path, base: Path | None, choices: Sequence[AdapterChoice]) -> tuple[list[Finding], list[str]]:
    """The files of a run, and those of base and adapters, against its manifest; (checks, what was not checked)."""
    try:
        manifest = read_sealed(run / NAME)
        check(manifest, _FIELDS, "the manifest", run / NAME)
    except InputError as error:
        return [Finding("manifest", False, f"{error.found} ({run / NAME})")], ["the files that it names"]
    found = hash_folder(run)
    del found[NAME]
    checks = [Finding("manifest", True, "complete, and agrees with its own digest")]
    checks += same_files("run_files", manifest["files"], found, _foreign(run))
    for folder in (run / "merged", run):  # the second without a merged folder
        certificate = folder / "lora_export_certificate.json"
        if certificate.is_file():
            checks += _same_options(manifest["options"]["merge"], certificate)
    if base is not None:
        checks += same_files("base_files", manifest["base"]["files"], _input_hashes(base))
    if choices and len(choices) != len(manifest["adapters"]):
        note = f"{len(choices)} adapters were given, the manifest names {len(manifest['adapters'])}"
        checks.append(Finding("adapter_files", False, note))
    for choice, entry in zip(choices, manifest["adapters"], strict=False):
        if choice.weight != entry["weight"]:
            note = f"the weight is {choice.weight:g}, the manifest has {entry['weight']:g}"
            checks.append(Finding("adapter_files", False, note))
        checks += same_files("adapter_files", entry["files"], _input_hashes(choice.folder))
    unproved = (
        "the report with its figures, and names, tool, versions and the options of validation and benchmark in the "
        "manifest: nothing else of the run depends on them"
    )
    return checks, [unproved, *([] if base and choices else ["the files of base and adapters that were not given"])]


def _foreign(run: Path) -> list[str]:
    """What a run does not hold: files of no stage, and links, which lead to what was not part of it."""
    notes = []
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            notes.append(f"{name} is a link, or no file")
        elif path.is_file() and name != NAME and name not in _WRITTEN and not name.startswith(("merged/", "onnx/")):
            notes.append(f"{name} is no file of a run")
    return notes


def _same_options(merge: Mapping[str, Any], certificate: Path) -> list[Finding]:
    """The options that a certificate keeps as they were given, whether they mattered or not."""
    try:
        recorded = read_json(certificate).get("options")
    except InputError:  # the check of the merged folder tells it
        return []
    as_given = names(MergeOptions, lambda how: how.json is not None and not how.conditional)
    if isinstance(recorded, dict) and all(merge.get(name) == recorded.get(name) for name in as_given):
        return []
    return [Finding("manifest", False, "its options of the merge are not those of the certificate")]


def same_files(
    name: str, wanted: Mapping[str, Any], found: Mapping[str, Any], notes: Sequence[str] = ()
) -> list[Finding]:
    """Each file that is missing, was added or was changed, after `notes` of other faults; or that all agree."""
    notes = [*notes, *(f"{n} is missing" for n in wanted if n not in found)]
    notes += [f"{n} was added" for n in found if n not in wanted]
    notes += [f"{n} was changed" for n in wanted if n in found and found[n] != wanted[n]]
    return [Finding(name, False, note) for note in notes] or [
        Finding(name, True, f"{len(found)} files have the size and SHA-256 of the manifest")
    ]
