"""Which files of a folder a runtime may open as a model, whatever their names."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_export.errors import ExportError, InputError
from lora_export.storage import sealed
from lora_export.storage.documents import walk

SUFFIX = ".onnx"
_RECORD = "export.json"
_GRAPH = 7  # the field of a ModelProto
_FLAT = b"ORTM"  # at byte 4 of ONNX Runtime's own format, which cannot be checked here
_FLAT_SUFFIX = ".ort"
_MOST_FIELDS = 2**16  # outermost fields to walk; a file with more counts as a graph
_VARINT = 10  # bytes of the longest number
_BEGIN, _END = 3, 4  # wire types of a group
_TRITON = re.compile(r"""default_model_filename\s*:\s*(["'])(.*?)\1""")


def find_graphs(folder: Path) -> list[Path]:
    """Every file below `folder` that a runtime may open as a graph: by its suffix, by its content, or because a
    configuration names it as a model.

    ExportError for a name that leads out of the folder of its configuration or to no file, and for a file in ONNX
    Runtime's own format, which cannot be checked.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    graphs = {p for p in files if p.suffix == SUFFIX or looks_like_graph(p)}
    for path in files:
        for name in named_models(path):
            graphs |= _beside(path, name)
    return sorted(graphs)


def _beside(config: Path, name: str) -> set[Path]:
    """The files that a configuration names. Triton's are in version folders, and may be folders; those of a
    pipeline's record are in a folder for each model."""
    inside = sealed.plain_path if config.name == _RECORD else sealed.plain_name
    if not inside(name):
        raise ExportError(
            f"a model named {name!r}",
            where=config,
            expected="a plain file name in the folder of the configuration",
        )
    places = [config.parent / name, *sorted(config.parent.glob(f"*/{name}"))]
    if not any(p.exists() for p in places):
        raise ExportError(
            f"the model {name!r}, which does not exist", where=config, expected="a file in the folder"
        )
    return {p for p in places if p.is_file()}


def named_models(path: Path) -> list[str]:
    """The models that a runtime's configuration names; none for any other file."""
    if path.name == "genai_config.json":
        return [name for name in _filenames(path) if name]
    if path.name == "config.pbtxt":
        text = path.read_text(encoding="utf-8", errors="replace")
        return [name for _, name in _TRITON.findall(text) if name]
    if path.name == _RECORD or path.name.endswith(f".{_RECORD}"):
        graphs = _json(path).get("graphs", [])
        return [g for g in graphs if isinstance(g, str)] if isinstance(graphs, list) else []
    return []


def _filenames(path: Path) -> Iterator[str]:
    """`filename` of each part of the model, at any depth."""
    for value in walk(_json(path), path):
        if isinstance(value, dict):
            yield from (v for k, v in value.items() if k == "filename" and isinstance(v, str))


def _json(path: Path) -> dict[str, Any]:
    try:
        return sealed.read_json(path)
    except InputError as error:
        raise ExportError(error.found, where=path, expected="a JSON object") from None


def looks_like_graph(path: Path) -> bool:
    """Whether a file is an ONNX model by its outermost fields, or in ONNX Runtime's own format."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if head[4:8] == _FLAT or path.suffix == _FLAT_SUFFIX:
            raise ExportError(
                "a model in ONNX Runtime's own format, which cannot be checked",
                where=path,
                expected="an ONNX protobuf",
                next_step="export the model again with lora-export export; do not run this one",
            )
        file.seek(0)
        return _walked(file, size)


def _walked(file: Any, size: int) -> bool:
    """Whether all bytes are protobuf fields, one of them a graph. Contents of fields are not read."""
    at, graph, depth = 0, False, 0
    for _ in range(_MOST_FIELDS):
        if at == size:
            return graph and not depth
        file.seek(at)
        head = file.read(2 * _VARINT)
        key, used = _varint(head, 0)
        value, end = _varint(head, used)
        number, wire = key >> 3, key & 7
        if not used or not number:
            return False
        if wire == 0 and end:
            at += end
        elif wire == 1 or wire == 5:
            at += used + (8 if wire == 1 else 4)
        elif wire == 2 and end:
            at += end + value
            graph = graph or (number == _GRAPH and not depth)
        elif wire in (_BEGIN, _END):  # no model has groups, and every parser skips them
            at, depth = at + used, depth + (1 if wire == _BEGIN else -1)
        else:
            return False
        if at > size or depth < 0:
            return False
    return True


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the offset behind it, or 0 as the offset if there is none."""
    value = 0
    for i, byte in enumerate(data[at : at + _VARINT]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    return 0, 0
