"""How much of a change is still there after rounding."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SAMPLE = 2**15  # elements of a block that are looked at; a smaller block is looked at whole


@dataclass
class Survival:
    """⟨W'−W, Δ⟩ / ⟨Δ, Δ⟩ with W' after rounding, summed in float64 over evenly spread rows of each block."""

    kept: float = 0.0
    delta: float = 0.0
    weight: float = 0.0

    def add(self, before: "torch.Tensor", after: "torch.Tensor", rounded: "torch.Tensor") -> None:
        """before, after: fp32; rounded: after, in the type of the output; all of one shape."""
        import torch

        delta = (after - before).reshape(-1)
        flat = before.reshape(-1)
        square = float(torch.dot(delta, delta))
        self.delta += square
        self.weight += float(torch.dot(flat, flat))
        if rounded.dtype == torch.float32:
            self.kept += square
        else:
            self.kept += float(torch.dot((rounded.to(torch.float32) - before).reshape(-1), delta))

    def join(self, other: "Survival") -> None:
        self.kept += other.kept
        self.delta += other.delta
        self.weight += other.weight

    @property
    def share(self) -> float | None:
        return self.kept / self.delta if self.delta > 0 else None

    @property
    def relative_delta(self) -> float | None:
        return float((self.delta / self.weight) ** 0.5) if self.weight > 0 else None


def sampled(block: "torch.Tensor") -> Any:
    """The index of rows of a block that are enough to judge it by."""
    if not block.dim():
        return ...
    return slice(None, None, max(1, min(block.numel() // SAMPLE, len(block))))
