"""weights-map.json: which bytes of an export's data files are made of which checkpoint tensors, and how.

A graph does not depend on the values of the weights. So an export is a graph, a list of `Weight`s, and whoever
writes their bytes: the first export and the re-weighting of an earlier one are the same work on another checkpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.errors import ExportError
from lora_export.storage import sealed
from lora_export.storage.documents import LARGEST, as_json, decode, elements

NAME = "weights-map.json"
SCHEMA_VERSION = 1
PAGE = 4096  # bytes: where a large weight begins, so that it can be mapped
ALIGNMENT = 256  # bytes: where others begin, as CUDA wants it
LARGE = 2**20  # bytes
# ONNX types of what data files hold → bytes of one element
ITEM_SIZE = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1,
    "float64": 8,
}  # fmt: skip
Part = Literal["packed", "scales", "zero_points"]
Method = Literal["int4", "int8", "nf4", "fp4"]


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a checkpoint tensor (along its first dimension); a scalar has one."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Quantization:
    """One of the arrays that a blockwise quantizer makes of a matrix (out, in). part: which of them.

    block_size: elements along `in` that share a scale; algorithm: how the scale of a block is chosen.
    """

    method: Method
    part: Part
    block_size: int
    symmetric: bool = True
    algorithm: str = "default"


@dataclass(frozen=True)
class Recipe:
    """Pieces below each other, plus a number, turned to (columns, rows) if `transposed`, and cast or quantized.

    The arithmetic is in fp32 and rounded once. No pieces: bytes that do not depend on the weights (rotary caches,
    masks), which a re-weighting copies. computed_from: tensors of which the bytes were computed in a way that is
    not described here; they have to stay as they are.
    """

    pieces: tuple[Piece, ...] = ()
    transposed: bool = False
    plus: float = 0.0
    quantized: Quantization | None = None
    computed_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weight:
    """Bytes [offset, offset + nbytes) of a data file: an initializer of one graph or of several that share it.

    name: the initializer's; dtype: its ONNX type, lower case; shape: its shape, row-major.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    recipe: Recipe = field(default_factory=Recipe)
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return ITEM_SIZE[self.dtype] * prod(self.shape)

    def stored(self, folder: Path, source: TensorSource) -> TensorInfo:
        """Its bytes in an export, as a tensor of a source that reads files."""
        end = self.offset + self.nbytes
        return TensorInfo(self.name, self.dtype, self.shape, folder / self.file, self.offset, end, source)


@dataclass(frozen=True)
class WeightsMap:
    """weights: in the order of the files; hashes: of the bytes of every tensor of the checkpoint that was exported,
    as the certificate has them. Those that no weight is made of count too: what a graph leaves out, such as a bias
    of zeros, must be the same in the next checkpoint."""

    weights: tuple[Weight, ...]
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Data file → bytes."""
        sizes: dict[str, int] = {}
        for w in self.weights:
            sizes[w.file] = max(sizes.get(w.file, 0), w.offset + w.nbytes)
        return sizes

    @property
    def tensors(self) -> set[str]:
        """The checkpoint tensors that weights are made of."""
        return {p.tensor for w in self.weights for p in w.recipe.pieces}


def placed(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """The same weights with offsets, one behind the other in each file."""
    ends: dict[str, int] = {}
    out = []
    for weight in weights:
        alignment = PAGE if weight.nbytes >= LARGE else ALIGNMENT
        at = -(-ends.get(weight.file, 0) // alignment) * alignment
        ends[weight.file] = at + weight.nbytes
        out.append(replace(weight, offset=at))
    return tuple(out)


# --- the file ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PieceEntry:
    """rows: [first, behind the last]."""

    tensor: str
    rows: tuple[int, int]


@dataclass(frozen=True)
class WeightEntry:
    """A weight and its recipe on one level. What has its default is not written."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    made_of: tuple[PieceEntry, ...]
    transposed: bool = False
    plus: float = 0.0
    quantized: Quantization | None = None
    computed_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class MapDocument:
    schema_version: int
    hashes: Mapping[str, str]
    weights: tuple[WeightEntry, ...]


def write(folder: Path, described: WeightsMap) -> None:
    """Write weights-map.json into the folder of an export."""
    document = MapDocument(SCHEMA_VERSION, described.hashes, tuple(_entry(w) for w in described.weights))
    value: dict[str, Any] = as_json(document)
    optional = ("transposed", "plus", "quantized", "computed_from")
    for entry in value["weights"]:
        for name in optional:
            if not entry[name]:
                del entry[name]
    sealed.write_json(folder / NAME, value)


def _entry(weight: Weight) -> WeightEntry:
    recipe = weight.recipe
    made_of = tuple(PieceEntry(p.tensor, (p.start, p.stop)) for p in recipe.pieces)
    return WeightEntry(
        weight.name, weight.file, weight.dtype, weight.shape, weight.offset, made_of,
        recipe.transposed, recipe.plus, recipe.quantized, recipe.computed_from,
    )  # fmt: skip


def read(folder: Path) -> WeightsMap:
    """weights-map.json of an export; ExportError if what it says cannot be, InputError if it is damaged."""
    path = folder / NAME
    document = decode(sealed.read_json(path), MapDocument, "the weights map", path)
    if document.schema_version != SCHEMA_VERSION:
        raise _odd(path, f"schema_version {document.schema_version}", str(SCHEMA_VERSION))
    weights = tuple(_weight(entry, path) for entry in document.weights)
    _refuse_overlaps(weights, path)
    return WeightsMap(weights, document.hashes)


def _weight(entry: WeightEntry, path: Path) -> Weight:
    """A weight, distrusted: its bytes lie in a file of the folder, and its pieces are rows."""
    if not sealed.plain_name(entry.file):
        raise _odd(path, f"a data file called {entry.file!r}", "a plain file name", entry.name)
    if entry.dtype not in ITEM_SIZE:
        raise _odd(path, f"the type {entry.dtype!r}", ", ".join(ITEM_SIZE), entry.name)
    if entry.offset < 0 or any(n < 0 for n in entry.shape):
        raise _odd(path, "a negative size or offset", "0 or more", entry.name)
    count = elements(entry.shape)
    if count is None or entry.offset + count * ITEM_SIZE[entry.dtype] > LARGEST:
        raise _odd(path, f"the shape {list(entry.shape)}", "one that a tensor in a file can have", entry.name)
    if entry.quantized is not None and entry.quantized.block_size <= 0:
        raise _odd(path, f"the block_size {entry.quantized.block_size}", "1 or more", entry.name)
    for piece in entry.made_of:
        if not 0 <= piece.rows[0] <= piece.rows[1]:
            raise _odd(path, f"the rows {list(piece.rows)}", "[first, behind the last]", piece.tensor)
    pieces = tuple(Piece(p.tensor, *p.rows) for p in entry.made_of)
    recipe = Recipe(pieces, entry.transposed, entry.plus, entry.quantized, entry.computed_from)
    return Weight(entry.name, entry.file, entry.dtype, entry.shape, recipe, entry.offset)


def _refuse_overlaps(weights: tuple[Weight, ...], path: Path) -> None:
    ends: dict[str, int] = {}
    for weight in sorted(weights, key=lambda w: (w.file, w.offset)):
        if weight.offset < ends.get(weight.file, 0):
            raise _odd(path, f"bytes {weight.offset} of {weight.file} are given twice", "each once", weight.name)
        ends[weight.file] = weight.offset + weight.nbytes


def _odd(path: Path, found: str, expected: str, tensor: str | None = None) -> ExportError:
    return ExportError(
        f"the weights map has {found}",
        where=path,
        tensor=tensor,
        expected=expected,
        next_step="export the model again without --graph-from",
    )
