"""Jobs that write the arrays of quantized matrices, in blocks of rows where each row is quantized for itself."""

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from lora_export.contracts import TensorSource
from lora_export.onnx_export.quantize.settings import GPTQ
from lora_export.onnx_export.weights.map import Part, Recipe, Weight
from lora_export.onnx_export.weights.reading import as_stored, height_of, in_lines, lines_of, view
from lora_export.storage.workers import BLOCK, Job, OpenFile

if TYPE_CHECKING:
    import numpy as np

    from lora_export.onnx_export.quantize.errors import Errors
    from lora_export.onnx_export.quantize.statistics import Statistics
    from lora_export.onnx_export.weights.dtypes import Array


@dataclass(frozen=True)
class _Matrix:
    """parts: the arrays that a quantizer makes of it, some of them twice where an array has two names (an embedding
    and its head)."""

    parts: Sequence[Weight]
    out: OpenFile

    @property
    def recipe(self) -> Recipe:
        return self.parts[0].recipe

    @property
    def key(self) -> tuple[str, str]:
        """Data file and name of the packed numbers."""
        packed = (w for w in self.parts if w.recipe.quantized and w.recipe.quantized.part == "packed")
        return next((w.file, w.name) for w in packed)


@dataclass
class Matrices:
    """The quantized matrices of a layout. statistics, errors: as in DataFiles."""

    source: TensorSource
    statistics: "Statistics | None"
    errors: "dict[tuple[str, str], Errors]"
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _parts: dict[tuple[OpenFile, Recipe], list[Weight]] = field(default_factory=lambda: defaultdict(list))

    def add(self, weight: Weight, out: OpenFile) -> None:
        assert weight.recipe.quantized is not None
        whole = replace(weight.recipe, quantized=replace(weight.recipe.quantized, part="packed"))
        self._parts[out, whole].append(weight)

    def jobs(self) -> Iterator[Job]:
        """Matrices that multiply the same inputs are one job, which factors the inputs' moments once."""
        sharing: dict[str, list[_Matrix]] = defaultdict(list)
        for (out, recipe), parts in self._parts.items():
            matrix = _Matrix(parts, out)
            key = self.statistics.key(recipe) if self.statistics and _by_gptq(recipe) else None
            if key is None:
                yield from self._by_rows(matrix)
            else:
                sharing[key].append(matrix)
        for group in sorted(sharing.values(), key=self._work, reverse=True):  # so that no core waits for a long one
            width, _ = self._size(group[0].recipe)
            yield Job(partial(self._solve, group), cost=5 * 8 * width**2)

    def _work(self, group: Sequence[_Matrix]) -> int:
        sizes = [self._size(matrix.recipe) for matrix in group]
        return sum(width**2 * (width + height) for width, height in sizes)

    def _by_rows(self, matrix: _Matrix) -> Iterator[Job]:
        from lora_export.onnx_export.quantize.numbers import granularity

        recipe = matrix.recipe
        assert recipe.quantized is not None
        width, height = self._size(recipe)
        step = height
        if recipe.transposed:
            least = granularity(width, recipe.quantized)
            step = max(1, BLOCK // (4 * width * least)) * least
        for start in range(0, height, step):
            yield Job(partial(self._write_rows, matrix, start, min(start + step, height), height))

    def _size(self, recipe: Recipe) -> tuple[int, int]:
        """(in, out) of a matrix."""
        width = self.source.tensors[recipe.pieces[0].tensor].shape[-1]
        height = height_of(recipe, self.source)
        return (width, height) if recipe.transposed else (height, width)

    def _write_rows(self, matrix: _Matrix, start: int, stop: int, height: int) -> int:
        """Rows [start, stop) of a matrix (out, in) of `height` rows, quantized."""
        from lora_export.onnx_export.quantize import gptq
        from lora_export.onnx_export.quantize.errors import between
        from lora_export.onnx_export.quantize.numbers import dequantize, quantize

        recipe = matrix.recipe
        assert recipe.quantized is not None
        numbers = _as_in_graph(_numbers(recipe, self.source, start, stop), matrix.parts)
        if _by_gptq(recipe):
            arrays, errors = gptq.rounded(numbers, recipe.quantized, _type_of_scales(matrix.parts))
        else:
            arrays = quantize(numbers, recipe.quantized)
            errors = between(numbers, dequantize(arrays, numbers.shape[0], numbers.shape[1], recipe.quantized))
        self._note(matrix, errors)
        return _put(arrays, matrix, start, height)

    def _solve(self, group: Sequence[_Matrix]) -> int:
        """Matrices of the same inputs, one after the other."""
        from lora_export.onnx_export.quantize.gptq import COLUMNS, Solver

        assert self.statistics is not None
        moment = self.statistics.moment(group[0].recipe)
        assert moment is not None
        solver, written = Solver(moment), 0
        for matrix in group:
            assert matrix.recipe.quantized is not None
            _, height = self._size(matrix.recipe)
            for start in range(0, height, COLUMNS):
                numbers = _numbers(matrix.recipe, self.source, start, min(start + COLUMNS, height))
                numbers = _as_in_graph(numbers, matrix.parts)
                how = matrix.recipe.quantized
                arrays, errors = solver.quantize(numbers, how, _type_of_scales(matrix.parts))
                self._note(matrix, errors)
                written += _put(arrays, matrix, start, height)
        return written

    def _note(self, matrix: _Matrix, errors: "Errors") -> None:
        with self._turn:
            known = self.errors.get(matrix.key)
            self.errors[matrix.key] = errors if known is None else known + errors


def _by_gptq(recipe: Recipe) -> bool:
    return recipe.quantized is not None and recipe.quantized.algorithm == GPTQ


def _put(arrays: "Mapping[Part, Array]", matrix: _Matrix, start: int, height: int) -> int:
    """Write the arrays of rows from `start` on into the places of the parts."""
    written = 0
    for weight in matrix.parts:
        assert weight.recipe.quantized is not None
        data = arrays[weight.recipe.quantized.part]
        data = as_stored(data, weight) if data.dtype.kind == "f" else data
        matrix.out.write(view(data), weight.offset + weight.nbytes * start // height)
        written += data.nbytes
    return written


def _numbers(recipe: Recipe, source: TensorSource, start: int, stop: int) -> "Array":
    """(in, rows) in fp32, as ONNX's MatMul has it."""
    import numpy as np

    from lora_export.onnx_export.weights.dtypes import to_float32

    if not recipe.transposed:
        (piece,) = (in_lines(p, source) for p in recipe.pieces)
        rows = lines_of(source.tensors[piece.tensor], piece.start, piece.stop)[:, start:stop]
        return to_float32(np.ascontiguousarray(rows))
    stacked, at = [], 0
    for piece in (in_lines(p, source) for p in recipe.pieces):
        low, high = max(start - at, 0), min(stop - at, piece.stop - piece.start)
        if low < high:
            rows = lines_of(source.tensors[piece.tensor], piece.start + low, piece.start + high)
            stacked.append(to_float32(rows))
        at += piece.stop - piece.start
    return (stacked[0] if len(stacked) == 1 else np.concatenate(stacked)).T


def _as_in_graph(matrix: "Array", parts: Sequence[Weight]) -> "Array":
    """The matrix in the type that the graph has without quantization: ONNX Runtime's quantizers meet it rounded."""
    from lora_export.onnx_export.weights.dtypes import rounded, to_float32

    dtype = _type_of_scales(parts)
    cast = rounded(matrix, dtype)
    return cast if dtype.name == "float16" else to_float32(cast)


def _type_of_scales(parts: Sequence[Weight]) -> "np.dtype[np.generic]":
    from lora_export.onnx_export.weights.dtypes import ONNX

    scales = next(w for w in parts if w.recipe.quantized is not None and w.recipe.quantized.part == "scales")
    return ONNX[scales.dtype]
