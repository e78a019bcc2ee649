"""Weights quantized so that the outputs change least on calibration texts, not the weights themselves.

GPTQ (Frantar et al., 2023): inputs of a product are rounded one after the other, those with the largest moments
first, and what rounding one of them changes in the outputs is made up for by the weights of those that follow. The
grid of each block is fixed before, so that the order of the inputs leaves no trace in the graph. All of it is in
fp64: the codes then do not depend on the order of sums of a BLAS.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_export.onnx_export.quantize.errors import Errors
from lora_export.onnx_export.quantize.numbers import BITS, packed
from lora_export.onnx_export.weights.dtypes import Array
from lora_export.onnx_export.weights.map import Part, Quantization

Type = np.dtype[np.generic]
DAMPING = 0.01  # of the mean moment, added to each input's: inputs that the texts hardly show still cost something
OWN_DAMPING = 0.003  # of an input's own moment, added to it: more than halves in a file of statistics can take away
OUTER, INNER = 128, 4  # inputs whose later ones are changed together, by one matrix product
COLUMNS = 1024  # outputs that are quantized together, so that they stay in the processor's cache
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a block's range: what is cut off makes the rest finer


class Solver:
    """Quantizes matrices that multiply the same inputs.

    moment: the mean of x xᵀ over the inputs x, (in, in) float64; it is changed in place. Its Cholesky factors are
    computed once.
    """

    def __init__(self, moment: Array) -> None:
        diagonal = np.einsum("ii->i", moment)
        mean = float(np.maximum(diagonal, 0).mean()) or 1.0
        diagonal[diagonal <= 0] = mean
        self._moment, self._damping = moment, OWN_DAMPING * diagonal
        self._order = np.argsort(-diagonal, kind="stable")
        self._factor = self._factored(DAMPING * mean)

    def _factored(self, damping: float) -> Array:
        """Upper U with UᵀU = H⁻¹, inputs in the order of their rounding. An H that rounding has left indefinite
        gets more damping."""
        from scipy.linalg import lapack

        diagonal = np.einsum("ii->i", self._moment)
        diagonal += self._damping
        while True:
            diagonal += damping
            self._damping = self._damping + damping
            # U is the inverse of the lower factor of the reversed matrix, reversed again.
            turned = self._moment[np.ix_(self._order[::-1], self._order[::-1])]
            lower, failed = lapack.dpotrf(turned.T, lower=1, clean=1, overwrite_a=1)
            if not failed:
                inverse, _ = lapack.dtrtri(lower, lower=1, overwrite_c=1)
                return np.ascontiguousarray(inverse[::-1, ::-1])
            damping *= 10

    def quantize(self, matrix: Array, how: Quantization, dtype: Type) -> tuple[dict[Part, Array], Errors]:
        """The arrays of `numbers.quantize`, with zero points, and what they change.

        matrix: (in, out), whose columns are independent: best COLUMNS of them at a time; dtype: of the scales.
        """
        wanted = matrix.astype(np.float64)
        grid = _Grid.searched(wanted, np.einsum("ii->i", self._moment), how, dtype)
        codes, lost = self._codes(wanted, grid)
        outputs_lost = float(np.vdot(lost, lost))
        changed = (wanted - codes * grid.scales_of_rows(len(codes))) ** 2
        narrow, squares = wanted.astype(np.float32), wanted**2
        outputs = float(np.sum((self._narrow @ narrow) * narrow, dtype=np.float64))
        # Of both sums, what the damping adds is taken away.
        outputs, outputs_lost = (
            max(whole - float(self._damping @ part.sum(1)), 0.0)
            for whole, part in ((outputs, squares), (outputs_lost, changed))
        )
        errors = Errors(float(squares.sum()), float(changed.sum()), outputs, outputs_lost)
        return grid.packed(codes + grid.zeros_of_rows(len(codes)), how), errors

    @functools.cached_property
    def _narrow(self) -> Array:
        return self._moment.astype(np.float32)

    def _codes(self, wanted: Array, grid: "_Grid") -> tuple[Array, Array]:
        """Codes without their zero points, (in, out) float64; and e, inputs in the order of their rounding, with
        Uᵀe what the codes change in the weights, and so Σ e² what they change in the outputs."""
        order, factor, count = self._order, self._factor, len(wanted)
        left, codes, lost = wanted[order], np.empty_like(wanted), np.empty_like(wanted)
        for start, stop in _spans(0, count, OUTER):
            for first, last in _spans(start, stop, INNER):
                for i in range(first, last):
                    block, error = order[i] // grid.size, lost[i]
                    found = grid.nearest(left[i], block, codes[order[i]])
                    np.multiply(found, grid.scales[block], out=error)
                    np.subtract(left[i], error, out=error)
                    error *= 1 / factor[i, i]
                    if i + 1 < last:
                        left[i + 1 : last] -= factor[i, i + 1 : last, None] * error
                left[last:stop] -= factor[first:last, last:stop].T @ lost[first:last]
            left[stop:] -= factor[start:stop, stop:].T @ lost[start:stop]
        return codes, lost


def rounded(matrix: Array, how: Quantization, dtype: Type) -> tuple[dict[Part, Array], Errors]:
    """The arrays of `numbers.quantize` where no texts say which inputs matter: to nearest, on grids that are
    searched for the least error of the weights. matrix: (in, out); dtype: of the scales."""
    wanted = matrix.astype(np.float64)
    grid = _Grid.searched(wanted, np.ones(len(wanted)), how, dtype)
    scales, zeros = grid.scales_of_rows(len(wanted)), grid.zeros_of_rows(len(wanted))
    codes = np.clip(np.rint(wanted / scales + zeros), 0, grid.most)
    lost = float(np.sum((wanted - (codes - zeros) * scales) ** 2))
    return grid.packed(codes, how), Errors(float(np.sum(wanted**2)), lost)


@dataclass
class _Grid:
    """scales, zeros: (blocks, out) float64, the scales as the graph stores them; size: of a block; most: the
    largest code."""

    scales: Array
    zeros: Array
    size: int
    most: int
    dtype: Type

    @classmethod
    def searched(cls, wanted: Array, moments: Array, how: Quantization, dtype: Type) -> "_Grid":
        """With the range of each block that loses least, each input counted by its moment."""
        size, most = how.block_size, 2 ** BITS[how.method] - 1
        padded = _in_blocks(wanted.astype(np.float32), size)
        counted = _in_blocks(moments.astype(np.float32)[:, None], size)
        middle = (most + 1) // 2  # the zero point of symmetric blocks
        highest, lowest = np.maximum(padded.max(1), 0), np.minimum(padded.min(1), 0)
        if how.symmetric:  # as much above zero as the codes reach, one less than below
            lowest = np.minimum(lowest, -highest * np.float32(middle / (most - middle)))
            highest = -lowest * np.float32((most - middle) / middle)
        best: tuple[Array, Array, Array] | None = None
        for shrink in SHRINKS:
            scales = np.maximum((highest - lowest) * np.float32(shrink / most), _least(dtype))
            scales = scales.astype(dtype).astype(np.float32)
            zeros = np.clip(np.rint(-lowest / scales), 0, most)
            if how.symmetric:
                zeros[:] = middle
            found = padded / scales[:, None]
            found += zeros[:, None]
            np.clip(np.rint(found, out=found), 0, most, out=found)
            found -= zeros[:, None]
            found *= scales[:, None]
            found -= padded
            lost = np.einsum("bio,bio,bi->bo", found, found, counted[..., 0])
            if best is None:
                best = lost, scales, zeros
                continue
            better = lost < best[0]
            for kept, new in zip(best, (lost, scales, zeros), strict=True):
                kept[better] = new[better]
        assert best is not None
        return cls(best[1].astype(np.float64), best[2].astype(np.float64), size, most, dtype)

    def packed(self, codes: Array, how: Quantization) -> dict[Part, Array]:
        """codes: (in, out), with their zero points."""
        return packed(codes, self.scales, None if how.symmetric else self.zeros, how, self.dtype)

    def nearest(self, row: Array, block: int, out: Array) -> Array:
        """The codes of an input's weights, without their zero points."""
        np.divide(row, self.scales[block], out=out)
        np.rint(out, out=out)
        np.maximum(out, -self.zeros[block], out=out)
        np.minimum(out, self.most - self.zeros[block], out=out)
        return out

    def scales_of_rows(self, count: int) -> Array:
        return np.repeat(self.scales, self.size, axis=0)[:count]

    def zeros_of_rows(self, count: int) -> Array:
        return np.repeat(self.zeros, self.size, axis=0)[:count]


def _least(dtype: Type) -> np.float32:
    """The smallest scale: a block of zeros has it."""
    return np.float32(2.0**-24 if dtype == np.float16 else 1e-12)


def _in_blocks(rows: Array, size: int) -> Array:
    """(blocks, size, …) of rows, filled up with zeros."""
    missing = -len(rows) % size
    padded = np.pad(rows, ((0, missing), (0, 0))) if missing else rows
    return padded.reshape(-1, size, rows.shape[1])


def _spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + step, stop)) for i in range(start, stop, step))
