"""How two deltas of one weight lie to each other: what they will do to each other when they are added."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Overlap:
    """Sums over the elements that were seen. both: elements that both change; conflicts: those with other signs."""

    dot: float = 0.0
    first: float = 0.0
    second: float = 0.0
    both: int = 0
    conflicts: int = 0

    def add(self, first: "torch.Tensor", second: "torch.Tensor") -> None:
        """The same rows of both deltas, float64."""
        self.dot += float((first * second).sum())
        self.first += float(first.square().sum())
        self.second += float(second.square().sum())
        product = first.sign() * second.sign()
        self.both += int((product != 0).sum())
        self.conflicts += int((product < 0).sum())

    def join(self, other: "Overlap") -> None:
        self.dot += other.dot
        self.first += other.first
        self.second += other.second
        self.both += other.both
        self.conflicts += other.conflicts

    @property
    def cosine(self) -> float:
        """0 for deltas that have nothing to do with each other, or where one is zero."""
        return float(self.dot / (self.first * self.second) ** 0.5) if self.first * self.second > 0 else 0.0

    @property
    def sign_conflicts(self) -> float:
        """Share of the elements that both change; ½ for deltas that have nothing to do with each other."""
        return self.conflicts / self.both if self.both else 0.0

    @property
    def norm_ratio(self) -> float | None:
        """‖first‖/‖second‖; None where the second is zero."""
        return float((self.first / self.second) ** 0.5) if self.second > 0 else None
