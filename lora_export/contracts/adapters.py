"""An adapter understood: what it does to each weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_export.contracts.tensors import TensorInfo

if TYPE_CHECKING:
    import torch


class Update(Protocol):
    """What an adapter does to one weight.

    `apply(weight, rows)`: weight is fp32, the rows [rows.start, rows.stop) of the whole; returns an fp32 tensor of
    the same shape, which may be the weight itself, changed in place. With its tensors in float64, all is float64.
    Not a delta: replaced rows and normalised weights are no deltas.
    """

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor": ...


@dataclass(frozen=True)
class TargetUpdate:
    """What an adapter does to one weight, known from headers: nothing is read before `load`.

    target: the weight's name in the model (`model.layers.0.self_attn.q_proj.weight`)
    shapes: the shapes of that weight that this fits, None for a size that the adapter does not tell
    load(shape): reads the adapter's tensors for that shape
    keys: the adapter's own names of them
    replaces: the old weight does not matter, and may be absent
    optional: a base without this weight (a bias) needs no update
    tied: a weight that is tied to this one gets the same update, so the two stay tied
    row_wise(shape): rows of the result depend on the same rows of the weight alone, so blocks of rows may be given
    copies: how often the block is in memory at once, counted in fp32, while it is read, changed, judged and rounded
    adds: the change is the same for every weight
    low_rank: `load` gives a LowRankUpdate
    owner: which of the merged adapters it belongs to
    wide: it takes float64, whatever type is written
    parts: of several adapters combined, the updates of each
    tokens: the rows of a vocabulary that it replaces, where only those change
    beneath: what the names that are tied to this weight have in its place
    """

    target: str
    kind: str
    keys: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    load: Callable[[tuple[int, ...]], Update]
    replaces: bool = False
    optional: bool = False
    tied: bool = False
    row_wise: Callable[[tuple[int, ...]], bool] = lambda shape: True
    copies: int = 6
    adds: bool = False
    low_rank: bool = False
    owner: int = 0
    wide: bool = False
    parts: tuple[tuple["TargetUpdate", ...], ...] = ()
    tokens: tuple[int, ...] = ()
    beneath: tuple["TargetUpdate", ...] = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be meant."""
        return any(
            len(known) == len(shape) and all(k in (None, n) for k, n in zip(known, shape, strict=True))
            for known in self.shapes
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter understood: one update or more for each target weight, every tensor of the file accounted for.

    weight: the factor that it is combined with, where its updates do not have it already; plugin: the package and
    version that brings its kind, None for a built-in kind.
    """

    folder: Path
    kind: str
    config: Mapping[str, Any]
    updates: tuple[TargetUpdate, ...]
    tensors: Mapping[str, TensorInfo]
    weight: float = 1.0
    plugin: str | None = None

    @property
    def tensor_count(self) -> int:
        return len(self.tensors)
