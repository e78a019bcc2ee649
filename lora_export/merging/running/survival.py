"""How much of a change is still there after rounding."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLE = 2**15  # elements that are enough: a tensor of fewer than twice as many is looked at whole
SPARSEST = 32  # of so many rows one at least is looked at


@dataclass
class Survival:
    """⟨W'−W, Δ⟩ / ⟨Δ, Δ⟩ with W' after rounding, summed in float64 over evenly spread rows."""

    kept: float = 0.0
    delta: float = 0.0
    weight: float = 0.0

    def add(self, before: "torch.Tensor", after: "torch.Tensor", rounded: "torch.Tensor") -> None:
        """before, after: fp32 or float64; rounded: after, in the type of the output; all of one shape."""
        import torch

        delta = (after - before).reshape(-1)
        flat = before.reshape(-1)
        square = float(torch.dot(delta, delta))
        self.delta += square
        self.weight += float(torch.dot(flat, flat))
        if rounded.dtype == before.dtype:
            self.kept += square
        else:
            self.kept += float(torch.dot((rounded.to(before.dtype) - before).reshape(-1), delta))

    def join(self, other: "Survival") -> None:
        self.kept += other.kept
        self.delta += other.delta
        self.weight += other.weight

    @property
    def share(self) -> float | None:
        return self.kept / self.delta if self.delta != 0 else None

    @property
    def relative_delta(self) -> float | None:
        return float((self.delta / self.weight) ** 0.5) if self.weight != 0 else None


def stride(shape: Sequence[int]) -> int:
    """Every how many rows of a tensor one is looked at, from the first on: it follows from the shape alone."""
    return max(1, min(prod(shape) // SAMPLE, SPARSEST))


def sampled(shape: Sequence[int], start: int, rows: int) -> slice | None:
    """Those rows within a block of `rows` rows from `start` on, of a tensor of this shape; None if it has none."""
    step = stride(shape)
    first = -start % step
    return slice(first, None, step) if first < rows else None
