"""What several kinds share: the arithmetic of their updates, and the weights that these fit."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TargetUpdate, Update

if TYPE_CHECKING:
    import torch

DECOMPOSITION = 20  # copies in fp32: weight, factors, work space, products, all in float64


@dataclass(frozen=True)
class LowRank:
    """The delta scaling · left · right; left is fp32 (rows, r), right is fp32 (r, columns)."""

    left: "torch.Tensor"
    right: "torch.Tensor"
    scaling: float

    def double(self) -> "LowRank":
        return LowRank(self.left.double(), self.right.double(), self.scaling)

    def added_to(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """The weight's rows changed in place, as a matrix: what follows the first dimension is flat."""
        left = self.left[rows]
        return weight.reshape(len(left), self.right.shape[1]).addmm_(left, self.right, alpha=self.scaling)


@dataclass(frozen=True)
class LowRankUpdate:
    """weight + delta, row by row; a convolution's weight (out, in, kernel…) is taken as (out, rest)."""

    low_rank: LowRank

    @classmethod
    def of(
        cls, left: "torch.Tensor", right: "torch.Tensor", scaling: float = 1.0, flipped: bool = False
    ) -> "LowRankUpdate":
        """scaling · left · right added to a weight (out, in); flipped: which is stored as (in, out)."""
        return cls(LowRank(right.T, left.T, scaling) if flipped else LowRank(left, right, scaling))

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.low_rank.added_to(weight, rows).reshape(weight.shape)


def low_rank_of(update: Update) -> LowRank:
    """The factors of an update whose target says that it is low_rank."""
    assert isinstance(update, LowRankUpdate)
    return update.low_rank


@dataclass(frozen=True)
class BiasUpdate:
    """bias + scaling · addend; both of shape (out,)."""

    addend: "torch.Tensor"
    scaling: float

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return weight + self.scaling * self.addend[rows]


class ExactUpdate(ABC):
    """A change that needs all rows of a weight together and is computed in float64, whatever the weight's type is.

    flipped: the weight is stored as (in, out).
    """

    flipped = False

    @abstractmethod
    def changed(self, weight: "torch.Tensor") -> "torch.Tensor":
        """W' of the whole weight W (out, in), both float64."""

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        exact = weight.double()
        changed = self.changed(exact.T if self.flipped else exact)
        return (changed.T if self.flipped else changed).contiguous().to(weight.dtype)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: all arithmetic between them is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()


def rebuilt(part: Any, change: Callable[[Any], Any]) -> Any:
    """The same update with its tensors and factors changed, whatever it is made of."""
    import torch

    if isinstance(part, torch.Tensor | float):
        return change(part)
    if isinstance(part, tuple | list):
        return type(part)(rebuilt(one, change) for one in part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    return replace(part, **{f.name: rebuilt(getattr(part, f.name), change) for f in fields(part)})


def terms_of(update: Update, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
    """What an update makes of `terms`, the numbers that rows of the weight are summed up from without their signs.

    All float64. That is the update with all its numbers taken as positive, unless it says otherwise (`terms`).
    """
    own = getattr(update, "terms", None)
    added: torch.Tensor = own(weight, terms, rows) if own else rebuilt(update, abs).apply(terms, rows).abs()
    return added


def never(shape: tuple[int, ...]) -> bool:
    """For `TargetUpdate.row_wise`: all rows of the weight are needed together."""
    return False


@dataclass(frozen=True)
class WholeTarget(TargetUpdate):
    """A weight whose rows cannot be changed block by block."""

    row_wise: Callable[[tuple[int, ...]], bool] = never


@dataclass(frozen=True)
class SizedTarget(TargetUpdate):
    """A matrix whose rows and columns are multiples of `tiles`, of at least so many columns and elements."""

    tiles: tuple[int, int] = (1, 1)
    least_inputs: int = 0
    least: int = 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        if not super().fits(shape) or shape[1] < self.least_inputs or math.prod(shape) < self.least:
            return False
        return all(n % tile == 0 for n, tile in zip(shape, self.tiles, strict=True))


@dataclass(frozen=True)
class FlatTarget(TargetUpdate):
    """A weight of any number of dimensions that is one of `shapes` when all but its outputs are made flat."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        return super().fits(shape) or (len(shape) > 2 and super().fits((shape[0], math.prod(shape[1:]))))
