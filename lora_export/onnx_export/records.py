"""export.json: what an export says of itself, written by `export` and believed by nobody who can look."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from lora_export.choices import Activations, ModelKind, Precision
from lora_export.contracts import ExportResult
from lora_export.errors import InputError
from lora_export.storage import sealed
from lora_export.storage.documents import Kind, check, check_texts

NAME = "export.json"
_RECORD: Kind = {
    "engine": str, "precision": str, "nodes": int, "seconds": float, "kind": str, "task?": str, "graphs?": [str],
    "files?": [str],
    "activations?": str,
}  # fmt: skip


def load_export(place: Path) -> ExportResult:
    """What an earlier export left in a folder, or as one graph of a folder that adapters share. InputError if
    there is none."""
    name = NAME if place.is_dir() else f"{place.stem}.{NAME}"
    folder = place if place.is_dir() else place.parent
    record = read_record(folder, name)
    return ExportResult(
        output=folder,
        engine=record["engine"],
        precision=_known(Precision, record["precision"], folder),
        nodes=record["nodes"],
        seconds=record["seconds"],
        files={n: s for n, s in sealed.sizes(folder).items() if n in record.get("files", (n,))},
        kind=_known(ModelKind, record["kind"], folder),
        task=record.get("task", "text-generation"),
        graphs=tuple(record["graphs"]),
        fused_against_plain=_number(record.get("fused_against_plain")),
        activations=_known(Activations, record.get("activations", "float"), folder),
    )


def adapters_beside(folder: Path) -> list[str]:
    """The adapters that share the folder with an export, and those that its graph takes as it runs."""
    shared = [p.name.removesuffix(f".{NAME}") for p in folder.glob(f"*.{NAME}")]
    return sorted([*shared, *(p.stem for p in folder.glob("*.onnx_adapter"))])


def read_record(folder: Path, name: str = NAME) -> dict[str, Any]:
    """export.json, with graphs that are there. InputError for anything else. name: of an adapter's own record."""
    path = folder / name
    if not path.is_file():
        raise _no_export(folder, f"model.onnx and {name}")
    record = sealed.read_json(path)
    check_texts(record, path)
    check(record, _RECORD, "the record of the export", path)
    graphs = record.setdefault("graphs", ["model.onnx"])
    for name in graphs:
        if not sealed.plain_name(name) or not (folder / name).is_file():
            raise _no_export(folder, f"{name!r}, which {path.name} names")
    if not graphs:
        raise _no_export(folder, f"a graph, of which {path.name} names none")
    return record


def _no_export(folder: Path, expected: str) -> InputError:
    return InputError(
        "the folder holds no export",
        where=folder,
        expected=expected,
        next_step="lora-export export -m MODEL -o OUT",
    )


def _number(found: Any) -> float | None:
    return float(found) if isinstance(found, int | float) else None


def _known(words: Any, found: str, folder: Path) -> Any:
    if found not in get_args(words):
        raise InputError(
            f"the record of the export says {found!r}", where=folder / NAME, expected=", ".join(get_args(words))
        )
    return found


def write_record(folder: Path, record: Mapping[str, Any], name: str = NAME) -> None:
    sealed.write_json(folder / name, {**record, "versions": versions()})


def versions() -> dict[str, str]:
    """Installed versions of what makes graphs."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("onnxruntime-genai-cuda", "onnxruntime-genai", "onnx", "torch", "transformers"):
        try:
            found[name.removesuffix("-cuda").replace("-", "_")] = version(name)
        except PackageNotFoundError:
            continue
    return found
