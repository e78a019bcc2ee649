"""Rows of checkpoint tensors as a recipe asks for them, and in the type that a data file has."""

from math import prod
from typing import TYPE_CHECKING

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.errors import CheckpointError
from lora_export.onnx_export.weights.map import Piece, Recipe, Weight

if TYPE_CHECKING:
    from lora_export.onnx_export.weights.dtypes import Array


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


def in_lines(piece: Piece, source: TensorSource) -> Piece:
    each = _lines(source.tensors[piece.tensor])
    return Piece(piece.tensor, piece.start * each, piece.stop * each)


def height_of(recipe: Recipe, source: TensorSource) -> int:
    pieces = [in_lines(p, source) for p in recipe.pieces]
    return sum(p.stop - p.start for p in pieces)


def as_stored(rows: "Array", weight: Weight) -> "Array":
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


def view(data: "Array") -> memoryview:
    import numpy as np

    return memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
