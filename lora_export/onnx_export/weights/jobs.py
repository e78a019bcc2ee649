"""Jobs of filling a data file: each writes some bytes of one weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora_export.errors import CheckpointError
from lora_export.onnx_export.weights.map import Piece, Recipe, Weight
from lora_export.onnx_export.weights.source import WeightSource
from lora_export.storage.disk import copy_range, start_writing_back
from lora_export.storage.workers import BLOCK, OpenFile

if TYPE_CHECKING:
    from lora_export.onnx_export.weights.dtypes import Array


TILE = 2**25  # bytes in fp32 that are turned at a time; a larger matrix is written in tiles, line by line

STRIP = 2**18  # bytes of rows that are turned in one go, so that they stay in the processor's cache

COPY = 2**24  # bytes that a thread copies before it takes something else


def elements_of(source: WeightSource, piece: Piece) -> int:
    count = piece.stop - piece.start
    for n in source.tensors[piece.tensor].shape[1:]:
        count *= n
    return count


class Job(Protocol):
    def run(self) -> int:
        """Bytes written."""
        ...


@dataclass(frozen=True)
class Copy(Job):
    source: OpenFile
    start: int
    length: int
    out: OpenFile
    at: int

    def run(self) -> int:
        try:
            copy_range(self.source.fd, self.start, self.length, self.out.fd, self.at)
        except EOFError:
            raise CheckpointError("the file ended early", where=self.source.path) from None
        except OSError as error:
            error.filename, error.filename2 = str(self.source.path), str(self.out.path)
            raise
        start_writing_back(self.out.fd, self.at, self.length)
        return self.length


def copies(source: OpenFile, start: int, length: int, out: OpenFile, at: int) -> Iterator[Copy]:
    for done in range(0, length, COPY):
        yield Copy(source, start + done, min(COPY, length - done), out, at + done)


@dataclass(frozen=True)
class Rows(Job):
    """Rows [start, stop) of a tensor, cast, to `at`."""

    weight: Weight
    source: WeightSource
    piece: Piece
    out: OpenFile
    at: int

    def run(self) -> int:
        piece = self.piece
        data = _cast(self.source.rows(piece.tensor, piece.start, piece.stop), self.weight)
        self.out.write(_view(data), self.at)
        return int(data.nbytes)


@dataclass(frozen=True)
class Tile(Job):
    """Rows of matrices (out, in) below each other, turned, and so the columns [column, …) of the initializer
    (in, out)."""

    weight: Weight
    source: WeightSource
    pieces: tuple[Piece, ...]
    out: OpenFile
    column: int

    def run(self) -> int:
        width, height = sum(p.stop - p.start for p in self.pieces), self.weight.shape[0]
        turned, at = None, 0
        for start, stop, name in self._strips():
            rows = _cast(self.source.rows(name, start, stop), self.weight)
            if turned is None:
                turned = _empty((height, width), rows)
            turned[:, at : at + stop - start] = rows.T
            at += stop - start
        assert turned is not None
        size = turned.itemsize
        at, apart = self.weight.offset + self.column * size, self.weight.shape[1] * size
        self.out.write_lines(_view(turned), width * size, at, apart)
        return int(turned.nbytes)

    def _strips(self) -> Iterator[tuple[int, int, str]]:
        """Rows that stay in the processor's cache while they are turned."""
        step = max(16, STRIP // (self.weight.shape[0] * 4))
        for piece in self.pieces:
            for start in range(piece.start, piece.stop, step):
                yield start, min(start + step, piece.stop), piece.tensor


def straight(weight: Weight, source: WeightSource, out: OpenFile) -> Iterator[Job]:
    """Jobs for a weight that is not quantized."""
    if weight.recipe.transposed:
        yield from _tiles(weight, source, out)
        return
    at = weight.offset
    for piece in weight.recipe.pieces:
        width = elements_of(source, Piece(piece.tensor, 0, 1)) * 4
        step = max(1, BLOCK // max(1, width))
        for start in range(piece.start, piece.stop, step):
            part = Piece(piece.tensor, start, min(start + step, piece.stop))
            yield Rows(weight, source, part, out, at)
            at += elements_of(source, part) * (weight.nbytes // max(1, _count(weight.shape)))


def _tiles(weight: Weight, source: WeightSource, out: OpenFile) -> Iterator[Tile]:
    """As wide as TILE allows, across pieces: a tile of the whole width is one write, a narrower one many."""
    most = max(1, TILE // max(4, weight.shape[0] * 4))
    parts: list[Piece] = []
    column = filled = 0
    for piece in weight.recipe.pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + most - filled)
            parts.append(Piece(piece.tensor, start, stop))
            filled, start = filled + stop - start, stop
            if filled == most:
                yield Tile(weight, source, tuple(parts), out, column)
                parts, column, filled = [], column + filled, 0
    if parts:
        yield Tile(weight, source, tuple(parts), out, column)


@dataclass(frozen=True)
class Blocks(Job):
    """Rows [start, stop) of a matrix (out, in), quantized; parts: the arrays that become of it, each by rows, and
    again where it has two names (an embedding and its head)."""

    parts: Sequence[Weight]
    source: WeightSource
    start: int
    stop: int
    out: OpenFile

    def run(self) -> int:
        from lora_export.onnx_export.quantize.numbers import quantize

        recipe = self.parts[0].recipe
        matrix = _as_in_graph(self._matrix(recipe), self.parts)
        assert recipe.quantized is not None
        arrays, written = quantize(matrix, recipe.quantized), 0
        for weight in self.parts:
            assert weight.recipe.quantized is not None
            data = arrays[weight.recipe.quantized.part]
            data = _cast(data, weight) if data.dtype.kind == "f" else data
            self.out.write(_view(data), weight.offset + self._share(weight, self.start))
            written += data.nbytes
        return written

    def _matrix(self, recipe: Recipe) -> "Array":
        """(in, rows) in fp32, as ONNX's MatMul has it."""
        import numpy as np

        from lora_export.onnx_export.weights.dtypes import to_float32

        if not recipe.transposed:
            (piece,) = recipe.pieces
            rows = self.source.rows(piece.tensor, piece.start, piece.stop)[:, self.start : self.stop]
            return to_float32(np.ascontiguousarray(rows))
        found, at = [], 0
        for piece in recipe.pieces:
            low, high = max(self.start - at, 0), min(self.stop - at, piece.stop - piece.start)
            if low < high:
                rows = self.source.rows(piece.tensor, piece.start + low, piece.start + high)
                found.append(to_float32(rows))
            at += piece.stop - piece.start
        return (found[0] if len(found) == 1 else np.concatenate(found)).T

    def _share(self, weight: Weight, row: int) -> int:
        return weight.nbytes * row // _height(self.parts, self.source)


def quantize(parts: Sequence[Weight], source: WeightSource, out: OpenFile) -> Iterator[Job]:
    """Jobs for one matrix and all arrays that a quantizer makes of it."""
    from lora_export.onnx_export.quantize.numbers import granularity

    recipe, height = parts[0].recipe, _height(parts, source)
    assert recipe.quantized is not None
    step = height
    if recipe.transposed:
        width = elements_of(source, recipe.pieces[0]) // (recipe.pieces[0].stop - recipe.pieces[0].start)
        least = granularity(width, recipe.quantized)
        step = max(1, BLOCK // (4 * width * least)) * least
    for start in range(0, height, step):
        yield Blocks(parts, source, start, min(start + step, height), out)


def _as_in_graph(matrix: "Array", parts: Sequence[Weight]) -> "Array":
    """The matrix in the type that the graph has without quantization: ONNX Runtime's quantizers meet it rounded."""
    from lora_export.onnx_export.weights.dtypes import ONNX, rounded, to_float32

    scales = next(w for w in parts if w.recipe.quantized is not None and w.recipe.quantized.part == "scales")
    cast = rounded(matrix, ONNX[scales.dtype])
    return cast if scales.dtype == "float16" else to_float32(cast)


def _height(parts: Sequence[Weight], source: WeightSource) -> int:
    """Rows of the matrix (out, in)."""
    recipe = parts[0].recipe
    if recipe.transposed:
        return sum(p.stop - p.start for p in recipe.pieces)
    return source.tensors[recipe.pieces[0].tensor].shape[1]


def _count(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _cast(rows: "Array", weight: Weight) -> "Array":
    from lora_export.onnx_export.weights.dtypes import ONNX, cast, rounded, to_float32

    dtype = ONNX[weight.dtype]
    if rows.dtype == dtype and not weight.recipe.plus:
        return rows
    if rows.dtype.kind in "biu":  # integers are no weights of a sum
        return rows.astype(dtype)
    if not weight.recipe.plus:
        return cast(rows, dtype)
    wide = to_float32(rows)
    return rounded(wide + wide.dtype.type(weight.recipe.plus), dtype)


def _empty(shape: tuple[int, ...], like: "Array") -> "Array":
    import numpy as np

    return np.empty(shape, like.dtype)


def _view(data: "Array") -> memoryview:
    import numpy as np

    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
