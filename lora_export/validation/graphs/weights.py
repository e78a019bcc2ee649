"""Reads the weights that an exported graph computes with from its data files, by its weights-map.json.

This reader shares no code with the writer in onnx_export/. The formats are ONNX Runtime's (contrib operators
MatMulNBits, MatMulBnb4, GatherBlockQuantized).
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from lora_export.errors import ExportError
from lora_export.storage.sealed import plain_name, read_json

NAME = "weights-map.json"
_TYPES: Mapping[str, Any] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64,
    "uint8": np.uint8, "int8": np.int8, "int32": np.int32, "int64": np.int64, "bool": np.bool_,
}  # fmt: skip
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Quantized:
    """How a matrix was quantized: elements of a block share a scale.

    symmetric: without zero points; axis: the axis of the checkpoint's matrix along which blocks run; width: columns
    of that matrix, which may be one of several that a row of the tensor holds (experts); algorithm: how scales and
    codes were chosen; first: the first piece of the initializer, as statistics name it; packed: names of the packed
    numbers, in the data file `file`.
    """

    method: str
    block_size: int
    symmetric: bool
    axis: int
    width: int
    algorithm: str = "default"
    first: str = ""
    file: str = ""
    packed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """Rows [start, stop) of a checkpoint tensor as a graph contains them.

    values: fp32, in the checkpoint's orientation, (rows, …) flattened to two dimensions; dtype: of the data file
    (of the scales, if quantized); plus: a number that was added to the graph's data, already subtracted here.
    """

    tensor: str
    start: int
    stop: int
    values: torch.Tensor
    dtype: torch.dtype
    plus: float = 0.0
    quantized: Quantized | None = None


def read(graphs: Sequence[Path], shapes: Shapes) -> Iterator[Held]:
    """Every piece of a checkpoint tensor that an export's graphs contain, one initializer at a time.

    The map says what an initializer stands for; the values are those that the graph itself refers to, wherever they
    are stored, or NaN if no node reads them, because the graph then computes with others. shapes: of the
    checkpoint's tensors; pieces of other tensors are skipped, and so is what the engine computed from weights in a
    way that the map does not describe. ExportError for a map that contradicts itself or the graphs.
    """
    folder = graphs[0].parent
    entries = [e for e in read_json(folder / NAME)["weights"] if e["made_of"] and not e.get("computed_from")]
    entries = [e for e in entries if all(p["tensor"] in shapes for p in e["made_of"])]
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for index, entry in enumerate(entries):
        how = entry.get("quantized")
        made_of = tuple((p["tensor"], *p["rows"]) for p in entry["made_of"])
        key = (made_of, entry["file"], how["method"], how["block_size"]) if how else index
        groups[key].append(entry)
    sources = [_Initializers(graph) for graph in graphs]
    for parts in groups.values():
        holding = [s for s in sources if all(s.has(e) for e in parts)]
        if not holding:
            raise _odd(folder, parts[0], "an initializer that no graph has")
        for source in holding:
            quantized = bool(parts[0].get("quantized"))
            held = _quantized(source, parts, shapes) if quantized else _plain(source, parts[0], shapes)
            unread = not all(map(source.reads, parts))
            yield from (replace(h, values=torch.full_like(h.values, math.nan)) if unread else h for h in held)


class _Initializers:
    """The initializers of one graph file, including those in branches and loops."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        model = ir.load(path)
        graphs = (model.graph, *model.graph.subgraphs())
        values = {name: value for graph in graphs for name, value in graph.initializers.items()}
        self._tensors = {name: v.const_value for name, v in values.items() if v.const_value is not None}
        self._read = {v.name for node in model.graph.all_nodes() for v in node.inputs if v is not None}
        self._read |= {value.name for graph in graphs for value in graph.outputs}
        self._files = {t.location for t in self._tensors.values() if isinstance(t, ir.ExternalTensor)}

    def has(self, entry: Mapping[str, Any]) -> bool:
        """Whether the map means an initializer of this graph: encoder and decoder may have the same names."""
        return entry["name"] in self._tensors and entry["file"] in self._files

    def reads(self, entry: Mapping[str, Any]) -> bool:
        """Whether a node reads it."""
        return entry["name"] in self._read

    def array(self, entry: Mapping[str, Any]) -> "np.ndarray[Any, Any]":
        """The values in their type and shape. Those in a data file are mapped rather than read."""
        tensor, wanted = self._tensors[entry["name"]], np.dtype(_TYPES[entry["dtype"]])
        shape = tuple(int(n) for n in tensor.shape.numpy())
        if list(shape) != list(entry["shape"]):
            raise _odd(self.folder, entry, f"the shape {entry['shape']} for {list(shape)} in the graph")
        if not isinstance(tensor, ir.ExternalTensor):
            return np.asarray(tensor.numpy().astype(wanted))
        file = str(tensor.location)
        if not plain_name(file) or (self.folder / file).is_symlink():
            raise _odd(self.folder, entry, f"the data file {file!r}")
        if math.prod(shape) == 0:
            return np.zeros(shape, wanted)
        try:
            return np.memmap(self.folder / file, wanted, "c", tensor.offset or 0, shape or (1,))
        except (OSError, ValueError) as error:
            raise _odd(self.folder, entry, f"data that cannot be read ({error})") from None


def arithmetic_type(folder: Path) -> torch.dtype:
    """The narrowest floating-point type of the data files: what the graph computes in."""
    types = {e["dtype"] for e in read_json(folder / NAME)["weights"] if e["dtype"] in _FLOATS}
    return max((_TORCH[t] for t in types), key=lambda t: torch.finfo(t).eps, default=torch.float32)


def quantized_blocks(folder: Path, initializers: Collection[str]) -> dict[str, int]:
    """Checkpoint tensor → elements that share a scale, for the tensors of quantized `initializers`."""
    return {
        piece["tensor"]: entry["quantized"]["block_size"]
        for entry in read_json(folder / NAME)["weights"]
        if entry.get("quantized") and entry["name"] in initializers
        for piece in entry["made_of"]
    }


def _plain(source: _Initializers, entry: Mapping[str, Any], shapes: Shapes) -> Iterator[Held]:
    if entry["dtype"] not in _FLOATS:
        return
    values = source.array(entry)
    if entry.get("transposed"):
        values = values.reshape(values.shape[0], -1).T
    yield from _pieces(source.folder, entry, _fp32(values), shapes, _TORCH[entry["dtype"]], None)


def _quantized(source: _Initializers, parts: Sequence[Mapping[str, Any]], shapes: Shapes) -> Iterator[Held]:
    by_part = {e["quantized"]["part"]: e for e in parts}
    first, how = parts[0], parts[0]["quantized"]
    stacked = sum((p["rows"][1] - p["rows"][0]) * math.prod(shapes[p["tensor"]][1:-1]) for p in first["made_of"])
    width = shapes[first["made_of"][0]["tensor"]][-1]
    inputs, outputs = (width, stacked) if first.get("transposed") else (stacked, width)
    arrays = {part: source.array(e) for part, e in by_part.items()}
    try:
        matrix = _dequantized(arrays, outputs, inputs, how)
    except (ValueError, KeyError) as error:
        raise _odd(source.folder, first, f"parts that do not fit together ({error})") from None
    values = matrix if first.get("transposed") else matrix.T
    axis = 1 if first.get("transposed") else 0
    kind = Quantized(
        how["method"], how["block_size"], how["symmetric"], axis, width, how.get("algorithm", "default"),
        "{tensor}[{rows[0]}:{rows[1]}]".format_map(first["made_of"][0]), first["file"],
        tuple(e["name"] for e in parts if e["quantized"]["part"] == "packed"),
    )  # fmt: skip
    yield from _pieces(source.folder, first, values, shapes, _TORCH[by_part["scales"]["dtype"]], kind)


def _pieces(
    folder: Path,
    entry: Mapping[str, Any],
    values: torch.Tensor,
    shapes: Shapes,
    dtype: torch.dtype,
    quantized: Quantized | None,
) -> Iterator[Held]:
    plus, at = float(entry.get("plus", 0.0)), 0
    pieces = [(p["tensor"], *p["rows"]) for p in entry["made_of"]]
    widths = [max(1, math.prod(shapes[name][1:])) for name, _, _ in pieces]
    total = sum((stop - start) * width for (_, start, stop), width in zip(pieces, widths, strict=True))
    if total != values.numel() or len(set(widths)) != 1:
        raise _odd(folder, entry, f"{values.numel()} numbers for {total} of the checkpoint")
    rows = values.reshape(-1, widths[0])
    for name, start, stop in pieces:
        part = rows[at : at + stop - start] - plus if plus else rows[at : at + stop - start]
        yield Held(name, start, stop, part, dtype, plus, quantized)
        at += stop - start


def _dequantized(arrays: Mapping[str, Any], outputs: int, inputs: int, how: Mapping[str, Any]) -> torch.Tensor:
    """The matrix (outputs, inputs) in fp32 that ONNX Runtime's operator multiplies by."""
    size, method = how["block_size"], how["method"]
    scales = _fp32(arrays["scales"])
    packed = torch.from_numpy(np.array(arrays["packed"]))
    if method in ("nf4", "fp4"):
        return _bitsandbytes(packed.reshape(-1), scales.reshape(-1), outputs, inputs, how)
    bits, blocks = int(method.removeprefix("int")), -(-inputs // size)
    codes = _unpacked(packed.reshape(outputs, blocks, -1), bits).reshape(outputs, blocks, size).float()
    zeros = torch.full((outputs, blocks), float(2 ** (bits - 1)))
    if "zero_points" in arrays:
        points = torch.from_numpy(np.array(arrays["zero_points"])).reshape(outputs, -1)
        zeros = _unpacked(points, bits).reshape(outputs, -1)[:, :blocks].float()
    values = (codes - zeros[..., None]) * scales.reshape(outputs, blocks)[..., None]
    return values.reshape(outputs, -1)[:, :inputs]


def _bitsandbytes(
    packed: torch.Tensor, scales: torch.Tensor, outputs: int, inputs: int, how: Mapping[str, Any]
) -> torch.Tensor:
    """Blocks of the flattened matrix (outputs, inputs); the first of two numbers is in the upper half of a byte."""
    from bitsandbytes.functional import get_4bit_type

    codes = torch.stack((packed >> 4, packed & 0xF), -1).reshape(-1)[: outputs * inputs].long()
    table = get_4bit_type(how["method"], device="cpu")
    values: torch.Tensor = table[codes] * scales.repeat_interleave(how["block_size"])[: outputs * inputs]
    return values.reshape(outputs, inputs)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of packed bytes, the lower half of a byte first; the last dimension grows."""
    return packed if bits == 8 else torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)


def _fp32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.require(values, np.float32, ["C", "A", "W"]))


def _odd(folder: Path, entry: Mapping[str, Any], what: str) -> ExportError:
    return ExportError(
        f"the weights map has {what}",
        where=folder / NAME,
        tensor=entry["name"],
        expected="the bytes of the initializer, as the export wrote them",
        next_step="export the model again",
    )
