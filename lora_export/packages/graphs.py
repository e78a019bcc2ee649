"""Graphs with their data files under other names, which the graph has to know."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lora_export.errors import ExportError
from lora_export.storage import disk

ALIGNMENT = 256  # bytes, as CUDA requires
LARGEST_CHUNK = 2**31 - 2**20  # bytes of one data file: a browser's ArrayBuffer holds 2 GiB less a bit
Range = tuple[Path, int, int]  # file, offset, length


@dataclass(frozen=True)
class PlacedRange:
    """Where a range of an old data file goes: number of the new file, offset in it."""

    chunk: int
    offset: int


def load(path: Path) -> ir.Model:
    """The graph; its external tensors know the folder of their file."""
    return ir.load(path)


def external(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    """Initializers whose bytes are in a file, in all graphs of the model."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value, value.const_value


def range_of(tensor: ir.ExternalTensor) -> Range:
    """The bytes of an external tensor."""
    return Path(tensor.path), tensor.offset or 0, tensor.length or 0


def forget_types(model: ir.Model) -> None:
    """Drop inferred types and shapes of a graph that was taken apart: they refer to its former inputs."""
    for graph in (model.graph, *model.graph.subgraphs()):
        values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:
            if not value.is_graph_output():
                value.type = value.shape = None
                value.metadata_props.clear()


def nodes_for(graph: ir.Graph, outputs: Sequence[ir.Value], given: Sequence[ir.Value] = ()) -> list[ir.Node]:
    """The nodes that compute `outputs` from `given`, in order."""
    needed: set[ir.Value | None] = set(outputs)
    kept = []
    for node in reversed(graph):
        if needed & (set(node.outputs) - set(given)):
            needed |= set(node.inputs)
            kept.append(node)
    return kept[::-1]


def save(model: ir.Model, target: Path, data: str, largest: int = LARGEST_CHUNK) -> int:
    """Write a graph to `target` and its weights beside it: `data`, `data`_1, … of at most `largest` bytes each.

    Bytes that no tensor refers to are dropped, and tensors that share bytes keep sharing them. Returns the number
    of data files; ExportError if a single tensor is larger than a file may be.
    """
    tensors = list(external(model))
    places = _planned([range_of(tensor) for _, tensor in tensors], largest)
    count = 1 + max((p.chunk for p in places.values()), default=-1)
    names = [data if i == 0 else f"{data}_{i}" for i in range(count)]
    _copy(places, [target.parent / name for name in names])
    for value, tensor in tensors:
        at = places[range_of(tensor)]
        value.const_value = ir.ExternalTensor(
            names[at.chunk],
            at.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(value.name),
            base_dir=target.parent,
        )
    target.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return count


def _planned(ranges: list[Range], largest: int) -> dict[Range, PlacedRange]:
    """Each range once, in the order of the old files, from aligned offsets."""
    places: dict[Range, PlacedRange] = {}
    chunk = at = 0
    for path, start, length in sorted(set(ranges), key=lambda r: (str(r[0]), r[1], r[2])):
        if length > largest:
            raise ExportError(
                f"a tensor has {length:,} bytes, and this runtime reads files of {largest:,}",
                where=path,
                expected="a smaller precision",
                next_step="--variant q4",
            )
        if at and at + length > largest:
            chunk, at = chunk + 1, 0
        places[path, start, length] = PlacedRange(chunk, at)
        at += -(-length // ALIGNMENT) * ALIGNMENT
    return places


def _copy(places: Mapping[Range, PlacedRange], targets: list[Path]) -> None:
    with ExitStack() as stack:
        out = [_opened(stack, t, os.O_WRONLY | os.O_CREAT | os.O_EXCL) for t in targets]
        sources = {p: _opened(stack, p, os.O_RDONLY) for p in {path for path, _, _ in places}}
        for (path, start, length), at in places.items():
            disk.copy_range(sources[path], start, length, out[at.chunk], at.offset)


def _opened(stack: ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags, 0o666)
    stack.callback(os.close, fd)
    return fd
