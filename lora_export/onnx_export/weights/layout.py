"""The layout of an export's weights: which bytes of its data files are made of which tensors, in blocks.

No weight is in memory as a whole, unless a quantizer needs it so, and torch is not needed at all. A first export
and the next adapter of the same graph go the same way, without and with an earlier export to copy from.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_export.checkpoint.tensor_files import TensorFiles
from lora_export.contracts import Progress, TensorInfo, TensorSource
from lora_export.errors import CheckpointError, ExportError
from lora_export.onnx_export.weights.map import Piece, Recipe, Weight, WeightsMap
from lora_export.storage.workers import BLOCK, ComparedFile, Job, OpenFile, carry_out, copies, reuse_memory

if TYPE_CHECKING:
    from lora_export.onnx_export.weights.dtypes import Array
    from lora_export.storage.workers import Bytes

TILE = 2**25  # bytes in fp32 that are turned at a time; a larger matrix is written in tiles, line by line
STRIP = 2**18  # bytes of rows that are turned in one go, so that they stay in the processor's cache
STRIPS = 2  # that are read together


class Differs(Protocol):
    def __call__(self, file: str, at: int, wanted: "Bytes", there: "Bytes") -> None:
        """A place of a data file with other bytes than belong there; `there` is shorter where the file ends."""


@dataclass
class DataFiles:
    """folder: holds the data files, or gets them; earlier: an export with the same graphs, of which constants are
    taken, and every weight whose tensors have the hash that they had then; compared: nothing is written, and this
    is called for each place where the folder differs.
    """

    folder: Path
    described: WeightsMap
    source: TensorSource
    progress: Progress
    earlier: Path | None = None
    unchanged: frozenset[str] = frozenset()
    compared: Differs | None = None

    def write(self) -> None:
        """Write every byte that a recipe or an earlier export gives. ExportError, CheckpointError, OSError."""
        check_sources(self.described, self.source)
        reuse_memory()
        total = sum(w.nbytes for w in self.described.weights)
        with contextlib.ExitStack() as opened:
            carry_out(self._jobs(opened), look=lambda written: self.progress.advance(written, total))

    def _jobs(self, opened: contextlib.ExitStack) -> Iterator[Job]:
        files = {n: opened.enter_context(contextlib.closing(self._opened(n))) for n in self.described.sizes}
        earlier = TensorFiles({}, follow=False)
        quantized = defaultdict(list)
        for name, size in self.described.sizes.items() if self.compared is None else ():
            files[name].resize(size)
        for weight in self.described.weights:
            out = files[weight.file]
            if self.earlier is not None and all(p.tensor in self.unchanged for p in weight.recipe.pieces):
                yield from copies(weight.stored(self.earlier, earlier), out, weight.offset)
            elif weight.recipe.quantized is not None:
                whole = replace(weight.recipe, quantized=replace(weight.recipe.quantized, part="packed"))
                quantized[weight.file, whole].append(weight)
            elif weight.recipe.transposed:
                yield from _tiles(weight, self.source, out)
            else:
                yield from _straight(weight, self.source, out)
        for (name, _), parts in quantized.items():
            yield from _quantized(parts, self.source, files[name])

    def _opened(self, name: str) -> OpenFile:
        path = self.folder / name
        if self.compared is not None:
            return ComparedFile.compare(path, partial(self.compared, name), os.O_NOFOLLOW)
        flags = os.O_WRONLY | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if self.earlier else 0)
        return OpenFile(path, os.open(path, flags, 0o666))


def lines_of(info: TensorInfo, start: int, stop: int) -> "Array":
    """Lines [start, stop) of a matrix, or of the matrices of all experts below each other: (lines, columns), in the
    tensor's own type, as numpy has it. CheckpointError for types it does not have."""
    return _read(info, start, stop, _lines(info)).reshape(stop - start, -1)


def rows_of(info: TensorInfo, start: int, stop: int) -> "Array":
    """Rows [start, stop) of the first dimension, as `lines_of`."""
    return _read(info, start, stop, 1).reshape(stop - start, *info.shape[1:])


def _read(info: TensorInfo, start: int, stop: int, lines: int) -> "Array":
    """Numbers from `start` to `stop`, counted in lines of which a row has `lines`."""
    import numpy as np

    from lora_export.onnx_export.weights.dtypes import STORED

    if info.dtype not in STORED:
        raise CheckpointError(
            f"weights of type {info.dtype} cannot be exported",
            where=info.file,
            tensor=info.name,
            expected=", ".join(STORED),
            next_step="lora-export merge -b BASE -a ADAPTER -o OUT, then export OUT",
        )
    each = info.row_nbytes // lines
    data = np.empty((stop - start) * each, np.uint8)
    info.source.read_into(info, start * each, data.data)
    return data.view(STORED[info.dtype])


def _lines(info: TensorInfo) -> int:
    """How many lines a row of the tensor has: one in a matrix."""
    return prod(info.shape[1:-1])


def _in_lines(piece: Piece, source: TensorSource) -> Piece:
    each = _lines(source.tensors[piece.tensor])
    return Piece(piece.tensor, piece.start * each, piece.stop * each)


def _height(recipe: Recipe, source: TensorSource) -> int:
    pieces = [_in_lines(p, source) for p in recipe.pieces]
    return sum(p.stop - p.start for p in pieces)


# --- weights that are not quantized ------------------------------------------------------------------------


def _straight(weight: Weight, source: TensorSource, out: OpenFile) -> Iterator[Job]:
    at = weight.offset
    for piece in weight.recipe.pieces:
        info = source.tensors[piece.tensor]
        width = prod(info.shape[1:])
        step, size = max(1, BLOCK // max(4, width * 4)), weight.nbytes // max(1, prod(weight.shape))
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            yield Job(partial(_write_rows, weight, info, start, stop, out, at))
            at += (stop - start) * width * size


def _write_rows(weight: Weight, info: TensorInfo, start: int, stop: int, out: OpenFile, at: int) -> int:
    """Rows [start, stop) of a tensor, cast, to `at`."""
    data = _cast(rows_of(info, start, stop), weight)
    out.write(_view(data), at)
    return int(data.nbytes)


def _tiles(weight: Weight, source: TensorSource, out: OpenFile) -> Iterator[Job]:
    """As wide as TILE allows, across pieces: a tile of the whole width is one write, a narrower one many."""
    most = max(1, TILE // max(4, weight.shape[0] * 4))
    parts: list[Piece] = []
    column = filled = 0
    for piece in (_in_lines(p, source) for p in weight.recipe.pieces):
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + most - filled)
            parts.append(Piece(piece.tensor, start, stop))
            filled, start = filled + stop - start, stop
            if filled == most:
                yield Job(partial(_write_tile, weight, source, tuple(parts), out, column))
                parts, column, filled = [], column + filled, 0
    if parts:
        yield Job(partial(_write_tile, weight, source, tuple(parts), out, column))


def _write_tile(weight: Weight, source: TensorSource, pieces: tuple[Piece, ...], out: OpenFile, column: int) -> int:
    """Rows of matrices (out, in) below each other, turned, and so the columns [column, …) of the initializer
    (in, out)."""
    import numpy as np

    width, height = sum(p.stop - p.start for p in pieces), weight.shape[0]
    step = max(16, STRIP // (height * 4))  # rows that stay in the processor's cache while they are turned
    turned, at = None, 0
    for piece in pieces:
        for start in range(piece.start, piece.stop, STRIPS * step):
            read = lines_of(source.tensors[piece.tensor], start, min(start + STRIPS * step, piece.stop))
            for first in range(0, len(read), step):
                rows = _cast(read[first : first + step], weight)
                if turned is None:
                    turned = np.empty((height, width), rows.dtype)
                turned[:, at : at + len(rows)] = rows.T
                at += len(rows)
    assert turned is not None
    size = turned.itemsize
    out.write_lines(_view(turned), width * size, weight.offset + column * size, weight.shape[1] * size)
    return int(turned.nbytes)


# --- quantized weights -------------------------------------------------------------------------------------


def _quantized(parts: Sequence[Weight], source: TensorSource, out: OpenFile) -> Iterator[Job]:
    """Jobs for one matrix and all arrays that a quantizer makes of it: by rows where they are rows in the tensors,
    and again where an array has two names (an embedding and its head)."""
    from lora_export.onnx_export.quantize.numbers import granularity

    recipe = parts[0].recipe
    assert recipe.quantized is not None
    width = source.tensors[recipe.pieces[0].tensor].shape[-1]
    height = step = _height(recipe, source) if recipe.transposed else width
    if recipe.transposed:
        least = granularity(width, recipe.quantized)
        step = max(1, BLOCK // (4 * width * least)) * least
    for start in range(0, height, step):
        yield Job(partial(_write_blocks, parts, source, start, min(start + step, height), height, out))


def _write_blocks(
    parts: Sequence[Weight], source: TensorSource, start: int, stop: int, height: int, out: OpenFile
) -> int:
    """Rows [start, stop) of a matrix (out, in) of `height` rows, quantized."""
    from lora_export.onnx_export.quantize.numbers import quantize

    recipe = parts[0].recipe
    assert recipe.quantized is not None
    arrays, written = quantize(_as_in_graph(_matrix(recipe, source, start, stop), parts), recipe.quantized), 0
    for weight in parts:
        assert weight.recipe.quantized is not None
        data = arrays[weight.recipe.quantized.part]
        data = _cast(data, weight) if data.dtype.kind == "f" else data
        out.write(_view(data), weight.offset + weight.nbytes * start // height)
        written += data.nbytes
    return written


def _matrix(recipe: Recipe, source: TensorSource, start: int, stop: int) -> "Array":
    """(in, rows) in fp32, as ONNX's MatMul has it."""
    import numpy as np

    from lora_export.onnx_export.weights.dtypes import to_float32

    if not recipe.transposed:
        (piece,) = (_in_lines(p, source) for p in recipe.pieces)
        rows = lines_of(source.tensors[piece.tensor], piece.start, piece.stop)[:, start:stop]
        return to_float32(np.ascontiguousarray(rows))
    stacked, at = [], 0
    for piece in (_in_lines(p, source) for p in recipe.pieces):
        low, high = max(start - at, 0), min(stop - at, piece.stop - piece.start)
        if low < high:
            rows = lines_of(source.tensors[piece.tensor], piece.start + low, piece.start + high)
            stacked.append(to_float32(rows))
        at += piece.stop - piece.start
    return (stacked[0] if len(stacked) == 1 else np.concatenate(stacked)).T


def _as_in_graph(matrix: "Array", parts: Sequence[Weight]) -> "Array":
    """The matrix in the type that the graph has without quantization: ONNX Runtime's quantizers meet it rounded."""
    from lora_export.onnx_export.weights.dtypes import ONNX, rounded, to_float32

    scales = next(w for w in parts if w.recipe.quantized is not None and w.recipe.quantized.part == "scales")
    cast = rounded(matrix, ONNX[scales.dtype])
    return cast if scales.dtype == "float16" else to_float32(cast)


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


def _view(data: "Array") -> memoryview:
    import numpy as np

    return memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


# --- what the source must have -----------------------------------------------------------------------------


def check_sources(described: WeightsMap, source: TensorSource) -> None:
    """ExportError unless the checkpoint has every tensor and row that weights are made of, in sizes that fit."""
    for weight in described.weights:
        elements = 0
        for piece in weight.recipe.pieces:
            info = source.tensors.get(piece.tensor)
            if info is None:
                raise _other_model(f"there is no {piece.tensor}", weight.name)
            if piece.stop > info.height:
                raise _other_model(f"{piece.tensor} has the shape {list(info.shape)}", weight.name)
            elements += (piece.stop - piece.start) * prod(info.shape[1:])
        if weight.recipe.quantized is not None:
            _check_quantized(weight, source)
        elif weight.recipe.pieces and elements != prod(weight.shape):
            raise _other_model(f"{elements} numbers for an initializer of {list(weight.shape)}", weight.name)


def _check_quantized(weight: Weight, source: TensorSource) -> None:
    """ExportError unless the array has the shape that a quantizer gives it."""
    from lora_export.onnx_export.quantize.numbers import shapes

    recipe = weight.recipe
    shapes_of = [source.tensors[p.tensor].shape for p in recipe.pieces]
    widths = {shape[-1] for shape in shapes_of if len(shape) in (2, 3)}
    if recipe.quantized is None or len(widths) != 1 or any(len(shape) < 2 for shape in shapes_of):
        raise _other_model(f"no matrix to quantize in {len(recipe.pieces)} pieces", weight.name)
    height, (width,) = _height(recipe, source), widths
    rows, columns = (width, height) if recipe.transposed else (height, width)
    if shapes(rows, columns, recipe.quantized).get(recipe.quantized.part) != weight.shape:
        raise _other_model(f"a matrix [{height}, {width}] for an array of {list(weight.shape)}", weight.name)


def _other_model(found: str, initializer: str) -> ExportError:
    return ExportError(
        f"{found}, which the graph's {initializer} is made of",
        expected="a model of the same shape as the one that was exported",
        next_step="export it without --graph-from",
    )
