"""A trained weight whose rows lie in several weights of the base, or in another order.

FLUX's `img_attn.qkv` is q, k and v below each other; the halves of `final_layer.adaLN_modulation` change places.
The update of the whole weight is finished first, and each weight of the base gets its rows of that.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.updates import LowRank, LowRankUpdate, terms_of
from lora_export.contracts import Adapter, TargetUpdate, Update
from lora_export.contracts.pipelines import Piece
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Rows of a weight of the base that are neighbours in the trained weight: `count` from `start`, which are
    those from `trained` there."""

    start: int
    trained: int
    count: int


@dataclass(frozen=True)
class Place:
    """Where all rows of a weight of the base lie in the trained weight. runs: in the order of the base."""

    target: str
    runs: tuple[Run, ...]

    @property
    def height(self) -> int:
        return sum(run.count for run in self.runs)

    def within(self, start: int, stop: int) -> Iterator[Run]:
        """The runs of the base's rows [start, stop); `start` of each is counted from the first of those."""
        for run in self.runs:
            first, last = max(start, run.start), min(stop, run.start + run.count)
            if first < last:
                yield Run(first - start, run.trained + first - run.start, last - first)


def place_of(piece: Piece, target: str, height: int) -> Place:
    """height: rows of the trained weight."""
    start, stop = piece.rows or (0, height)
    if not piece.swap:
        return Place(target, (Run(0, start, stop - start),))
    half = (stop - start) // 2
    return Place(target, (Run(0, start + half, half), Run(half, start, half)))


@dataclass(frozen=True)
class PieceUpdate:
    """Rows of an update of the whole trained weight, which goes row by row."""

    whole: Update
    place: Place

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        parts = [
            self.whole.apply(weight[run.start : run.start + run.count], slice(run.trained, run.trained + run.count))
            for run in self.place.within(rows.start, rows.start + len(weight))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        parts = []
        for run in self.place.within(rows.start, rows.start + len(weight)):
            here, trained = slice(run.start, run.start + run.count), slice(run.trained, run.trained + run.count)
            parts.append(terms_of(self.whole, weight[here], terms[here], trained))
        return torch.cat(parts)


@dataclass(frozen=True)
class FusedUpdate:
    """Rows of an update that needs all rows of the trained weight at once.

    others: rows of the base's other weights that are parts of the trained one, with their places there, fp32.
    """

    whole: Update
    place: Place
    others: tuple[tuple[Place, "torch.Tensor"], ...]
    height: int

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        changed = self.whole.apply(self._joined(weight), slice(0, self.height))
        return self._own(changed)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        absolute = FusedUpdate(self.whole, self.place, tuple((p, t.abs()) for p, t in self.others), self.height)
        fused = terms_of(self.whole, self._joined(weight), absolute._joined(terms), slice(0, self.height))
        return self._own(fused)

    def _joined(self, own: "torch.Tensor") -> "torch.Tensor":
        joined = own.new_empty((self.height, *own.shape[1:]))
        for place, part in ((self.place, own), *self.others):
            for run in place.runs:
                rows = part[run.start : run.start + run.count]
                joined[run.trained : run.trained + run.count] = rows.reshape(run.count, *own.shape[1:])
        return joined

    def _own(self, fused: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.cat([fused[run.trained : run.trained + run.count] for run in self.place.runs])


@dataclass(frozen=True)
class FusedTarget(TargetUpdate):
    """beside: weights of the base that the change is computed with, this one too where it is read from the base; no
    other adapter may have changed them before."""

    beside: tuple[str, ...] = ()


def refuse_changed(adapter: Adapter, before: Iterable[Adapter]) -> None:
    """AdapterError for an update that is computed with other weights that an adapter before this one changes.

    Those are read from the base.
    """
    changed = {update.target for other in before for update in other.updates}
    for update in adapter.updates:
        both = sorted(changed & set(update.beside)) if isinstance(update, FusedTarget) else []
        if both:
            raise AdapterError(
                f"{update.kind} computes {update.target} with {', '.join(both)}, which an adapter before this one "
                "changes",
                where=adapter.folder,
                tensor=update.keys[0],
                expected="the base's own weights",
                next_step="give this adapter first, or merge it alone",
            )


def cut(update: Update, place: Place, height: int) -> Update:
    """An update of the whole trained weight as that of one place; what is of low rank stays so."""
    if place.runs == (Run(0, 0, height),):
        return update
    if isinstance(update, LowRankUpdate):
        import torch

        low = update.low_rank
        left = torch.cat([low.left[run.trained : run.trained + run.count] for run in place.runs])
        return LowRankUpdate(LowRank(left, low.right, low.scaling))
    return PieceUpdate(update, place)


def covers(places: Sequence[Place], height: int) -> bool:
    """Whether each row of the trained weight lies in exactly one of the places."""
    runs = sorted((run for place in places for run in place.runs), key=lambda run: run.trained)
    at = 0
    for run in runs:
        if run.trained != at:
            return False
        at += run.count
    return at == height
