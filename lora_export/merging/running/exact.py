"""A tensor of the output computed again in float64, and how far the written numbers are from that.

The base's rows and the adapter's matrices are read anew, the output's rows from the written file. A quantized
weight is dequantized into fp32, as the merge does, and goes on from there.

The bound of an element: ½ ulp + 2⁻²⁰·(|W| + s·|B|·|A|), the rounding to the output's type and that of fp32 before;
for other formulas than LoRA's, the second part has all their numbers taken as positive (an update may say
otherwise: `terms`). The fp32 part is four times what is tested: what goes beyond is not imprecise but wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING

from lora_export.adapters.updates import terms_of
from lora_export.choices import Certify
from lora_export.contracts import TensorSource
from lora_export.finite import all_below
from lora_export.merging.planning.plan import PlannedTensor
from lora_export.merging.running.rows import Reader, base_rows, load_updates

if TYPE_CHECKING:
    import torch

Runs = tuple[tuple[int, int], ...]

RUNS = 4  # places of a tensor that are looked at
RUN = 2**12  # elements of a place, if its rows are as short
WIDE = 2**17  # elements of all places, if its rows are long (a row of fused experts is a whole expert)
CHUNK = 2**18  # elements that are looked at together
SLACK = 2.0**-20
_EXPONENT, _BIAS = 0x7FF, 1023  # of float64
_BITS = {
    "F64": (52, -1022),
    "F32": (23, -126),
    "F16": (10, -14),
    "BF16": (7, -126),
}  # of the mantissa; least exponent


def sampled_runs(shape: Sequence[int]) -> Runs:
    """Rows [start, stop) that are spread evenly over a tensor, from its first to its last; they follow from the
    shape alone, so that anyone can look at the same."""
    height, width = (shape[0] if shape else 1), max(1, prod(shape[1:]))
    length = max(1, RUN // width)
    count = max(1, min(RUNS, WIDE // width))
    if count * length >= height:
        return ((0, height),) if height else ()
    if count == 1:
        return (((height - length) // 2, (height - length) // 2 + length),)
    starts = [i * (height - length) // (count - 1) for i in range(count)]
    return tuple((s, s + length) for s in starts)


def all_runs(shape: Sequence[int]) -> Runs:
    """All rows of a tensor, in chunks."""
    height, width = (shape[0] if shape else 1), max(1, prod(shape[1:]))
    step = max(1, CHUNK // width)
    return tuple((s, min(s + step, height)) for s in range(0, height, step))


def runs_of(shape: Sequence[int], certify: Certify) -> Runs:
    return all_runs(shape) if certify == "full" else sampled_runs(shape)


def memory(tensor: PlannedTensor, runs: Runs) -> int:
    """Bytes that the comparison of these rows takes, as the merge counts them, in float64."""
    height, width = tensor.height, prod(tensor.shape[1:])
    rows = max((stop - start for start, stop in runs), default=0) if tensor.row_wise else height
    together = min(CHUNK, sum(stop - start for start, stop in runs) * width)
    return max(rows * width, together) * 4 * tensor.copies * (1 if tensor.wide else 2)


@dataclass
class Errors:
    """In ulps of the output's type at the exact value. beyond: elements beyond the bound; worst: a row of them."""

    checked: int = 0
    largest: float = 0.0
    total: float = 0.0
    beyond: int = 0
    worst: int | None = None

    @property
    def mean(self) -> float:
        return self.total / self.checked if self.checked else 0.0


class ExactTensor:
    """A planned tensor in float64. Not for several threads at a time."""

    def __init__(self, tensor: PlannedTensor, base: TensorSource) -> None:
        self._tensor = tensor
        self._packed = tensor.quantized.load(base) if tensor.quantized else None
        self._updates = load_updates(tensor, wide=True)

    def compare(self, written: Reader, runs: Runs) -> Errors:
        """How far the rows of `runs` are from float64. written: reads rows of the output, in its own type."""
        import torch

        errors = Errors()
        if not self._tensor.row_wise and runs:  # any of its rows needs all of the base's
            whole = (0, self._tensor.height)
            rows = torch.cat([torch.arange(start, stop) for start, stop in runs])
            self._judge(errors, written, runs, self._exact(*whole)[rows], lambda: self._terms(*whole)[rows])
            return errors
        for some in _bundles(runs, self._tensor.shape):
            exact = torch.cat([self._exact(*run) for run in some])
            self._judge(errors, written, some, exact, partial(self._terms_of, some))
        return errors

    def _exact(self, start: int, stop: int) -> "torch.Tensor":
        """Rows of the result, float64, or as they are where nothing changes them; a scalar has one row."""
        if not self._updates:
            return base_rows(self._tensor, self._packed, start, stop)
        exact = self._before(start, stop)
        shape = exact.shape
        for update in self._updates:
            exact = update.apply(
                exact.reshape(shape) if self._tensor.shape else exact.reshape(()), slice(start, stop)
            )
        return exact.reshape(shape)

    def _before(self, start: int, stop: int) -> "torch.Tensor":
        return base_rows(self._tensor, self._packed, start, stop).double()

    def _judge(
        self,
        errors: Errors,
        written: Reader,
        runs: Sequence[tuple[int, int]],
        exact: "torch.Tensor",
        terms: "Callable[[], torch.Tensor]",
    ) -> None:
        """terms: asked for only where the result alone does not show that the rows are within the bound."""
        import torch

        values = torch.cat([written(start, stop) for start, stop in runs])
        rows = [row for start, stop in runs for row in range(start, stop)]
        width = max(1, values.numel() // max(1, len(rows)))
        values, exact, terms = values.reshape(-1), exact.reshape(-1), cache(terms)
        wider = torch.promote_types(values.dtype, exact.dtype)
        for at in range(0, max(1, values.numel()), CHUNK):  # a row may be an expert, and larger than any cache
            some = slice(at, at + CHUNK)
            if torch.equal(values[some].to(wider), exact[some].to(wider)):  # as dequantized weights often are
                errors.checked += exact[some].numel()
                continue
            first = self._judge_some(errors, values[some], exact[some].double(), some, terms)
            if first is not None and errors.worst is None:
                errors.worst = rows[first // width]

    def _judge_some(
        self,
        errors: Errors,
        values: "torch.Tensor",
        exact: "torch.Tensor",
        some: slice,
        terms: "Callable[[], torch.Tensor]",
    ) -> int | None:
        """Add some of the numbers of rows, which are flat here; the place of the first beyond the bound."""
        import torch

        most = torch.finfo(values.dtype).max
        values = values.double()
        # What no number of the type is near to is --allow-nonfinite's.
        known = None if all_below(exact, most) else torch.isfinite(exact) & (exact.abs() <= most)
        off, unit = (values - exact).abs_(), ulp(exact, self._tensor.output.dtype)
        ulps = off / unit if known is None else torch.where(known, off / unit, 0.0)
        largest = float(ulps.max()) if ulps.numel() else 0.0
        errors.checked += exact.numel()
        errors.total += float(ulps.sum())
        errors.largest = largest if math.isnan(largest) else max(errors.largest, largest)  # keeps a NaN
        if largest <= 0.5:  # a NaN is within no bound
            return None
        # No formula's terms are smaller than its result.
        within = off <= unit / 2 + 2.0**-22 * exact.abs()
        if bool((within if known is None else within | ~known).all()):
            return None
        beyond = ~(off <= unit / 2 + SLACK * terms().reshape(-1)[some])
        beyond = beyond if known is None else beyond & known
        errors.beyond += int(beyond.sum())
        return some.start + int(beyond.nonzero()[0]) if bool(beyond.any()) else None

    def _terms_of(self, runs: Sequence[tuple[int, int]]) -> "torch.Tensor":
        import torch

        return torch.cat([self._terms(*run) for run in runs])

    def _terms(self, start: int, stop: int) -> "torch.Tensor":
        """|W| + s·|B|·|A| of rows, or what the formula has in its place, float64."""
        weight = self._before(start, stop)
        rows, shape = slice(start, stop), weight.shape
        if not self._tensor.shape:
            weight = weight.reshape(())
        terms = weight.abs()
        for update in self._updates:
            terms = terms_of(update, weight, terms, rows)
            weight = update.apply(weight, rows)
        return terms.reshape(shape)


def _bundles(runs: Runs, shape: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Runs that are small enough to be looked at together."""
    width, bundles, room = max(1, prod(shape[1:])), list[list[tuple[int, int]]](), 0
    for start, stop in runs:
        if not bundles or (stop - start) * width > room:
            bundles.append([])
            room = CHUNK
        bundles[-1].append((start, stop))
        room -= (stop - start) * width
    return bundles


def ulp(values: "torch.Tensor", dtype: str) -> "torch.Tensor":
    """The distance of the numbers of a type (by its safetensors name) around float64 values, float64."""
    import torch

    bits, least = _BITS[dtype]
    # By their bits: a logarithm or a power of a vector unit may be off by one.
    exponent = values.view(torch.int64).bitwise_right_shift(52).bitwise_and_(_EXPONENT)
    exponent.clamp_(min=least + _BIAS).sub_(bits).clamp_(min=1)
    return exponent.bitwise_left_shift_(52).view(torch.float64)
