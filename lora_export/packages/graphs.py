"""Graphs with their data under other names: a file that is renamed is not found, unless the graph is told."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import ExportError
from lora_export.storage import disk

if TYPE_CHECKING:
    import onnx

    Model = onnx.ModelProto

ALIGNMENT = 256  # bytes, which CUDA wants
LARGEST_CHUNK = 2**31 - 2**20  # bytes of one data file: a browser's ArrayBuffer holds 2 GiB less a bit
Range = tuple[Path, int, int]  # file, offset, length


@dataclass(frozen=True)
class Placed:
    """Where a range of an old data file comes to lie: number of the new file, offset in it."""

    chunk: int
    offset: int


def load(path: Path) -> "onnx.ModelProto":
    """The graph without the weights that lie in other files."""
    import onnx

    return onnx.load(str(path), load_external_data=False)


def opened(path: Path) -> "tuple[onnx.ModelProto, dict[str, Path]]":
    """A graph, and the folder of each of its external tensors: its own."""
    model = load(path)
    return model, {t.name: path.parent for t in external(model)}


def external(model: "onnx.ModelProto") -> "Iterator[onnx.TensorProto]":
    """Initializers whose bytes lie in a file, of all graphs within the model."""
    import onnx

    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        yield from (t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
        graphs += [a.g for n in graph.node for a in n.attribute if a.HasField("g")]


def range_of(tensor: "onnx.TensorProto", folder: Path) -> Range:
    """The bytes of an external tensor of a graph in `folder`."""
    entries = {e.key: e.value for e in tensor.external_data}
    return folder / entries["location"], int(entries.get("offset", 0)), int(entries["length"])


def save(
    model: "onnx.ModelProto",
    target: Path,
    data: str,
    sources: Mapping[str, Path],
    largest: int = LARGEST_CHUNK,
) -> int:
    """Write a graph to `target` and its weights beside it: `data`, `data`_1, … of at most `largest` bytes each.

    sources: name of each external initializer → the folder that its location is relative to. Bytes that no tensor
    names are left behind, and tensors of the same bytes keep sharing them. The number of data files; ExportError if
    one tensor alone is larger than a file may be.
    """
    tensors = {id(t): (t, range_of(t, sources[t.name])) for t in external(model)}
    places = _planned([r for _, r in tensors.values()], largest)
    count = 1 + max((p.chunk for p in places.values()), default=-1)
    names = [data if i == 0 else f"{data}_{i}" for i in range(count)]
    _copy(places, [target.parent / name for name in names])
    for tensor, where in tensors.values():
        del tensor.external_data[:]
        at = places[where]
        for key, value in (("location", names[at.chunk]), ("offset", at.offset), ("length", where[2])):
            tensor.external_data.add(key=key, value=str(value))
    target.write_bytes(model.SerializeToString(deterministic=True))
    return count


def _planned(ranges: list[Range], largest: int) -> dict[Range, Placed]:
    """Each range once, in the order of the old files, from aligned offsets."""
    places: dict[Range, Placed] = {}
    chunk = at = 0
    for path, start, length in sorted(set(ranges), key=lambda r: (str(r[0]), r[1], r[2])):
        if length > largest:
            raise ExportError(
                f"a tensor of {length:,} bytes, and this runtime reads files of {largest:,}",
                where=path,
                expected="a smaller precision",
                next_step="--variant q4",
            )
        if at and at + length > largest:
            chunk, at = chunk + 1, 0
        places[path, start, length] = Placed(chunk, at)
        at += -(-length // ALIGNMENT) * ALIGNMENT
    return places


def _copy(places: Mapping[Range, Placed], targets: list[Path]) -> None:
    with ExitStack() as stack:
        out = [_opened(stack, t, os.O_WRONLY | os.O_CREAT | os.O_EXCL) for t in targets]
        sources = {p: _opened(stack, p, os.O_RDONLY) for p in {path for path, _, _ in places}}
        for (path, start, length), at in places.items():
            disk.copy_range(sources[path], start, length, out[at.chunk], at.offset)


def _opened(stack: ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags, 0o666)
    stack.callback(os.close, fd)
    return fd
