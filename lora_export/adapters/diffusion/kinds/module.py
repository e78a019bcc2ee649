"""The tensors of one trained module beside the base's weights: shapes, scale, and the update of each weight."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_export.adapters.diffusion.pieces import (
    FusedTarget,
    FusedUpdate,
    Place,
    Run,
    Shape,
    covers,
    cut,
    place_of,
)
from lora_export.adapters.kind import AdapterFile, is_float64
from lora_export.contracts import TargetUpdate, Update
from lora_export.contracts.pipelines import Piece, TrainedModule
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

_NUMBERS = ("alpha", "scalar", "reshape_weight")
OTHER_BASE = "give the base that the adapter was trained on"


@dataclass(frozen=True)
class Trained:
    """A module of an adapter file. shapes: of the base's tensors in its component, by name."""

    file: AdapterFile
    module: TrainedModule
    shapes: Mapping[str, Shape]

    def has(self, *parts: str) -> bool:
        return all(part in self.module.keys for part in parts)

    def keys(self, *parts: str) -> tuple[str, ...]:
        """The names of the parts that are there."""
        return tuple(self.module.keys[part] for part in parts if part in self.module.keys)

    def shape(self, part: str) -> Shape:
        """From the header."""
        return self.file.tensors[self.module.keys[part]].shape

    def read(self, part: str) -> "torch.Tensor":
        """As `AdapterFile.read`."""
        return self.file.read(self.module.keys[part])

    def matrix(self, part: str) -> "torch.Tensor":
        """A part with all dimensions after the first made one."""
        return self.read(part).flatten(1)

    def scaling(self, rank: int) -> float:
        """The user's factor times alpha/r. No alpha is alpha = r, and so is 0 (LyCORIS, sd-scripts)."""
        return self.file.weight * (self.module.alpha / rank if self.module.alpha else 1.0)

    def factor(self, scaling: float) -> float:
        """The same with the learned factor of LyCORIS (`use_scalar`), where it was not multiplied in on saving."""
        return scaling * float(self.read("scalar")) if self.has("scalar") else scaling

    def target(self, piece: Piece, leaf: str) -> str:
        """leaf: weight or bias; a parameter that no module owns has neither."""
        return piece.module if piece.bare else f"{piece.module}.{leaf}"

    def stored(self, leaf: str) -> Shape:
        """The shape of the first of the base's weights; AdapterError if the base has none."""
        target = self.target(self.module.pieces[0], leaf)
        if target not in self.shapes:
            raise self.lacks(target)
        return self.shapes[target]

    def height(self, leaf: str) -> int:
        """Rows of the trained weight, as the base's weights have them."""
        ends = [piece.rows[1] for piece in self.module.pieces if piece.rows]
        return max(ends, default=next(iter(self.stored(leaf)), 0))

    def lacks(self, target: str) -> AdapterError:
        """The error for a weight that the base does not have."""
        return self.file.refuse(
            f"the base has no {target}, which this changes",
            tensor=next(iter(self.module.keys.values())),
            expected=f"a base with {target}",
            next_step=OTHER_BASE,
        )

    def disagree(self, expected: str, *parts: str) -> AdapterError:
        """The error for parts whose shapes do not go together."""
        said = ", ".join(f"{part} {list(self.shape(part))}" for part in parts)
        return self.file.refuse(
            f"the shapes do not match: {said}" if parts[1:] else f"the shape is {said}",
            tensor=self.module.keys[parts[0]],
            expected=expected,
        )


@dataclass(frozen=True)
class Whole:
    """What a module does to a trained weight, before that is cut into the base's weights.

    kind: of the update; parts: what it uses, the part that says the rank first; outputs: rows; rest: the other
    dimensions, one number for all of them together where the file has no kernel's; load(shape): the update of a
    weight (outputs, …) as the base stores it; leaf: weight or bias; beside: weights of the base that `load` reads,
    which no other adapter may have changed before; grain: where it does not go row by row, how many neighbouring
    rows can do without the others, 0 if none. The rest is as of TargetUpdate.
    """

    kind: str
    parts: tuple[str, ...]
    outputs: int
    rest: Shape | int
    load: Callable[[Shape], Update]
    leaf: str = "weight"
    adds: bool = False
    low_rank: bool = False
    row_wise: bool = True
    replaces: bool = False
    copies: int = 6
    beside: tuple[str, ...] = ()
    grain: int = 0


def spread(trained: Trained, whole: Whole) -> list[TargetUpdate]:
    """One update for each weight of the base. AdapterError where a shape is not the base's."""
    places = [_place(trained, whole, piece) for piece in trained.module.pieces]
    return [_target(trained, whole, place, places) for place in places]


def _target(trained: Trained, whole: Whole, place: Place, places: list[Place]) -> TargetUpdate:
    stored = trained.shapes[place.target]
    alone = whole.row_wise or place.runs == (Run(0, 0, whole.outputs),) or _grained(place, whole.grain)

    def load(shape: Shape) -> Update:
        return cut(whole.load((whole.outputs, *shape[1:])), place, whole.outputs)

    update = FusedTarget(
        place.target, whole.kind, trained.keys(*whole.parts), (stored,), load, replaces=whole.replaces,
        row_wise=lambda _: whole.row_wise, copies=whole.copies, adds=whole.adds, low_rank=whole.low_rank,
        beside=whole.beside,
    )  # fmt: skip
    return update if alone else _fused(trained, whole, update, place, places)


def _grained(place: Place, grain: int) -> bool:
    """Whether the rows are neighbours in whole groups."""
    return grain > 0 and all(run.trained % grain == 0 == run.count % grain for run in place.runs)


def _fused(trained: Trained, whole: Whole, update: FusedTarget, place: Place, places: list[Place]) -> TargetUpdate:
    """The update of a part that is computed with all parts of the trained weight, which the base is asked for."""
    others = [other for other in places if other is not place]
    check_covered(trained, whole, places)

    def load(shape: Shape) -> FusedUpdate:
        inner = whole.load((whole.outputs, *shape[1:]))
        return FusedUpdate(inner, place, tuple((p, _base(trained, p.target)) for p in others), whole.outputs)

    copies = whole.copies * math.ceil(whole.outputs / place.height)
    return replace(update, load=load, copies=copies, beside=tuple(p.target for p in others))


def check_covered(trained: Trained, whole: Whole, places: list[Place]) -> None:
    """That the base has every row of the trained weight once, as what mixes rows needs."""
    if not covers(places, whole.outputs):
        parts = ", ".join(f"{p.target} {list(trained.shapes[p.target])}" for p in places)
        raise trained.file.refuse(
            f"{whole.kind} computes with all {whole.outputs} rows of the trained weight; the base has {parts}",
            tensor=trained.module.keys[whole.parts[0]],
            expected="a base with every row of it once",
            next_step=OTHER_BASE,
        )


def places_of(trained: Trained, leaf: str, outputs: int) -> list[Place]:
    return [place_of(piece, trained.target(piece, leaf), outputs) for piece in trained.module.pieces]


def blocks(trained: Trained, places: list[Place]) -> "Iterator[tuple[slice, torch.Tensor]]":
    """Rows of the trained weight with the base's numbers, fp32 (within `float64`: in that), in the base's order."""
    import torch

    assert trained.file.base is not None
    for place in places:
        start = 0
        for stored in trained.file.base.blocks(place.target):
            block = stored.to(torch.float64 if is_float64() else torch.float32, copy=True)  # updates work in place
            for run in place.within(start, start + len(block)):
                yield slice(run.trained, run.trained + run.count), block[run.start : run.start + run.count]
            start += len(block)


def _base(trained: Trained, target: str) -> "torch.Tensor":
    import torch

    assert trained.file.base is not None
    return torch.cat(list(trained.file.base.blocks(target)))


def _place(trained: Trained, whole: Whole, piece: Piece) -> Place:
    """The piece's place, checked against the base's weight."""
    target = trained.target(piece, whole.leaf)
    if target not in trained.shapes:
        raise trained.lacks(target)
    stored = trained.shapes[target]
    start, stop = piece.rows or (0, whole.outputs)
    rows_fit = 0 <= start < stop <= whole.outputs and stored[:1] == (stop - start,)
    rows_fit &= not piece.swap or (stop - start) % 2 == 0
    if not (rows_fit and fits(stored[1:], whole.rest)):
        raise _misfit(trained, whole, piece, target)
    return place_of(piece, target, whole.outputs)


def fits(stored: Shape, rest: Shape | int) -> bool:
    """Whether a weight's dimensions after the first are the trained ones. A kernel of one point is none."""
    if isinstance(rest, int):
        return math.prod(stored) == rest
    return _without_points(stored) == _without_points(rest)


def _without_points(rest: Shape) -> Shape:
    return rest[:1] if all(n == 1 for n in rest[1:]) else rest


def _misfit(trained: Trained, whole: Whole, piece: Piece, target: str) -> AdapterError:
    rest = (whole.rest,) if isinstance(whole.rest, int) else whole.rest
    rows = f", of which rows {piece.rows[0]} to {piece.rows[1]} are meant" if piece.rows else ""
    present = (p for p in whole.parts if p in trained.module.keys and p not in _NUMBERS)
    said = ", ".join(f"{p} {list(trained.shape(p))}" for p in present)
    return trained.file.refuse(
        f"{said}: this is for a weight of shape {[whole.outputs, *rest]}{rows}; {target} of the base has "
        f"{list(trained.shapes[target])}",
        tensor=trained.module.keys[whole.parts[0]],
        expected="the shape of the base's weight",
        next_step=OTHER_BASE,
    )
