"""export.json: what an export says of itself, written by `export` and believed by nobody who can look."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from lora_export import files
from lora_export.contracts import ExportResult, ModelKind, Precision
from lora_export.documents import Kind, check, check_texts
from lora_export.errors import InputError

NAME = "export.json"
_RECORD: Kind = {
    "engine": str, "precision": str, "nodes": int, "seconds": float, "kind": str, "task?": str, "graphs?": [str],
}  # fmt: skip


def load_export(folder: Path) -> ExportResult:
    """What an earlier export left in `folder`; InputError if there is none."""
    record = read_record(folder)
    return ExportResult(
        output=folder,
        engine=record["engine"],
        precision=_known(Precision, record["precision"], folder),
        nodes=record["nodes"],
        seconds=record["seconds"],
        files=_sizes(folder),
        kind=_known(ModelKind, record["kind"], folder),
        task=record.get("task", "text-generation"),
        graphs=tuple(record["graphs"]),
    )


def read_record(folder: Path) -> dict[str, Any]:
    """export.json, with graphs that are there. InputError for anything else."""
    path = folder / NAME
    if not path.is_file():
        raise _no_export(folder, f"model.onnx and {NAME}")
    record = files.read_json(path)
    check_texts(record, path)
    check(record, _RECORD, "the record of the export", path)
    graphs = record.setdefault("graphs", ["model.onnx"])
    for name in graphs:
        if not files.plain_name(name) or not (folder / name).is_file():
            raise _no_export(folder, f"{name!r}, which {NAME} names")
    if not graphs:
        raise _no_export(folder, f"a graph, of which {NAME} names none")
    return record


def _no_export(folder: Path, expected: str) -> InputError:
    return InputError(
        "the folder holds no export",
        where=folder,
        expected=expected,
        next_step="lora-export export -m MODEL -o OUT",
    )


def _known(words: Any, found: str, folder: Path) -> Any:
    if found not in get_args(words):
        raise InputError(
            f"the record of the export says {found!r}", where=folder / NAME, expected=", ".join(get_args(words))
        )
    return found


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    files.write_json(folder / NAME, {**record, "versions": _versions()})


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("onnxruntime-genai-cuda", "onnxruntime-genai", "onnx", "torch", "transformers"):
        try:
            found[name.removesuffix("-cuda").replace("-", "_")] = version(name)
        except PackageNotFoundError:
            continue
    return found
