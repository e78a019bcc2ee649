"""manifest.json: what a run was made from and what it left, by size and SHA-256; written, and checked again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export import records
from lora_export.contracts import AdapterChoice, Finding, MergeOptions, QuantizationOptions, Source
from lora_export.errors import InputError
from lora_export.storage.documents import as_json, decode
from lora_export.storage.sealed import (
    LARGEST_SETTINGS,
    FileHash,
    hash_folder,
    hashed,
    hashed_once,
    plain_name,
    read_json,
    read_sealed,
    write_sealed,
)
from lora_export.version import __version__, installed

NAME = "manifest.json"
PACKAGE = "package/"  # of the objects of a fleet
PIPELINE_INDEX = "model_index.json"
_INPUTS = frozenset({".safetensors", ".json"})
_VOCABULARIES = frozenset({".txt", ".model"})  # of the tokenizers of a pipeline
_WRITTEN = {f"report/report.{kind}" for kind in ("json", "html", "md")} | {
    "report/samples.json", "report/conditions.json", "lora_export_certificate.json",
}  # fmt: skip
Hashing = Callable[[Path, Path | None], FileHash]
_FOLDERS = ("merged/", "onnx/", "report/pictures/")


@dataclass(frozen=True)
class Tool:
    name: str = "lora-export"
    version: str = __version__


@dataclass(frozen=True)
class RecordedSource:
    """A base. name: its folder's, or its Hub ID; commit: of the Hub; files: its weights and configuration."""

    name: str
    commit: str | None
    files: Mapping[str, FileHash]


@dataclass(frozen=True)
class RecordedAdapter:
    name: str
    commit: str | None
    weight: float
    files: Mapping[str, FileHash]


@dataclass(frozen=True)
class RecordedOptions:
    """The options of a run that later commands depend on; `RunManifest.options` holds all of them."""

    merge: MergeOptions
    precision: str = ""
    provider: str = ""
    engine: str | None = None
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)


@dataclass(frozen=True)
class RunManifest:
    """options: as the report has them; files: everything else in the folder of the run."""

    schema_version: int
    tool: Tool
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    base: RecordedSource
    adapters: tuple[RecordedAdapter, ...]
    files: Mapping[str, FileHash]

    @property
    def recorded_options(self) -> RecordedOptions:
        return decode(self.options, RecordedOptions, "the list of options in the manifest", NAME)


def write(stage: Path, base: Source, adapters: Sequence[AdapterChoice], options: Mapping[str, Any]) -> None:
    """Of everything in `stage`, sealed with its own digest. options: as the report keeps them."""
    manifest = RunManifest(
        schema_version=1,
        tool=Tool(),
        versions=versions(),
        options=options,
        base=RecordedSource(**named(base), files=_input_hashes(base.folder, hashed_once)),
        adapters=tuple(
            RecordedAdapter(**named(a.source), weight=a.weight, files=_input_hashes(a.folder, hashed_once))
            for a in adapters
        ),
        files=hash_folder(stage),
    )
    write_sealed(stage / NAME, as_json(manifest))


def read(run: Path) -> RunManifest:
    """InputError for one that is damaged, or was changed after it was written."""
    return parse(read_sealed(run / NAME), run)


def parse(document: Mapping[str, Any], run: Path) -> RunManifest:
    """The same, of a document that was read already; its digest is not looked at. Checks the options as well."""
    manifest = decode(document, RunManifest, "the manifest", run / NAME)
    decode(manifest.options, RecordedOptions, "the list of options in the manifest", run / NAME)
    return manifest


def is_run(folder: Path) -> bool:
    """Whether merge-and-export left this folder, with a merged model or without."""
    return (folder / NAME).is_file() and any((folder / name).is_dir() for name in ("merged", "onnx"))


def _input_hashes(place: Path, hashing: Hashing = hashed) -> dict[str, FileHash]:
    """Of weights and configuration: a folder's own files, an adapter that is one file, or all of a pipeline."""
    if place.is_file():
        return {place.name: hashing(place, None)}
    if (place / PIPELINE_INDEX).is_file():
        return {p.relative_to(place).as_posix(): hashing(p, place) for p in _pipeline_files(place)}
    paths = sorted(p for p in place.iterdir() if p.suffix in _INPUTS and p.is_file())
    return {p.name: hashing(p, None) for p in paths}


def _pipeline_files(folder: Path) -> list[Path]:
    """What a merge reads or copies of a pipeline: its index, and the files of the folders that the index names."""
    index = read_json(folder / PIPELINE_INDEX, limit=LARGEST_SETTINGS)
    parts = [name for name, told in index.items() if isinstance(told, list) and plain_name(name)]
    inside = (p for part in sorted(parts) for p in sorted((folder / part).rglob("*")))
    kept = (p for p in inside if p.is_file() and p.suffix in _INPUTS | _VOCABULARIES)
    return [folder / PIPELINE_INDEX, *(p for p in kept if not p.name.startswith("."))]


def versions() -> dict[str, str]:
    """Installed versions of what the results depend on."""
    import platform

    return {"python": platform.python_version()} | installed(
        (
            "torch", "transformers", "peft", "bitsandbytes", "safetensors", "onnx", "onnxscript",
            "onnxruntime-gpu", "onnxruntime", "onnxruntime-genai-cuda", "onnxruntime-genai", "optimum", "diffusers",
        )
    )  # fmt: skip


def named(source: Source) -> dict[str, Any]:
    """A folder by its last name only: a report travels, and the rest of the path stays private."""
    hub = source.commit is not None
    return {"name": source.name if hub else source.folder.resolve().name, "commit": source.commit}


def verify(run: Path, base: Path | None, choices: Sequence[AdapterChoice]) -> tuple[list[Finding], list[str]]:
    """The files of a run, and those of base and adapters, against its manifest; (checks, what was not checked)."""
    try:
        manifest = read(run)
    except InputError as error:
        return [Finding("manifest", False, f"{error.found} ({run / NAME})")], ["the files that it names"]
    beside = _beside(run)
    actual = {name: found for name, found in hash_folder(run).items() if name != NAME and not beside(name)}
    checks = [Finding("manifest", True, "complete, and matches its digest")]
    checks += same_files("run_files", manifest.files, actual, _foreign(run))
    if base is not None:
        checks += same_inputs("base_files", manifest.base.files, base)
    if choices and len(choices) != len(manifest.adapters):
        note = f"{len(choices)} adapters were given, the manifest names {len(manifest.adapters)}"
        checks.append(Finding("adapter_files", False, note))
    for choice, entry in zip(choices, manifest.adapters, strict=False):
        if choice.weight != entry.weight:
            note = f"the weight is {choice.weight:g}, the manifest has {entry.weight:g}"
            checks.append(Finding("adapter_files", False, note))
        checks += same_inputs("adapter_files", entry.files, choice.folder)
    unproved = (
        "the report with its figures, and names, tool, versions and the options of validation and benchmark in the "
        "manifest: nothing else of the run depends on them"
    )
    return checks, [unproved, *([] if base and choices else ["the files of base and adapters that were not given"])]


def same_inputs(name: str, wanted: Mapping[str, FileHash], place: Path) -> list[Finding]:
    """Whether a base or an adapter that is given again has the files of a manifest."""
    return same_files(name, wanted, _input_hashes(place))


def _foreign(run: Path) -> list[str]:
    """What does not belong to a run: files that no stage writes, and links, which lead out of it."""
    notes, beside = [], _beside(run)
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            notes.append(f"{name} is a link, or not a file")
        elif path.is_file() and name not in {NAME, *_WRITTEN} and not (name.startswith(_FOLDERS) or beside(name)):
            notes.append(f"{name} is not a file of a run")
    return notes


def _beside(run: Path) -> Callable[[str], bool]:
    """Whether a file is one that a fleet puts beside a run that it keeps: its record, which names all others, and a
    package, which has a manifest of its own."""
    if not (run / records.NAME).is_file():
        return lambda name: False
    return lambda name: name == records.NAME or name.startswith(PACKAGE)


def same_files(
    name: str, wanted: Mapping[str, FileHash], actual: Mapping[str, FileHash], notes: Sequence[str] = ()
) -> list[Finding]:
    """Each file that is missing, was added or was changed, after `notes` of other faults; or that all agree."""
    notes = [*notes, *(f"{n} is missing" for n in wanted if n not in actual)]
    notes += [f"{n} was added" for n in actual if n not in wanted]
    notes += [f"{n} was changed" for n in wanted if n in actual and actual[n] != wanted[n]]
    return [Finding(name, False, note) for note in notes] or [
        Finding(name, True, f"{len(actual)} files have the size and SHA-256 of the manifest")
    ]
