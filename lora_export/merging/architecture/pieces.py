"""Tensors on disk and the weights that transformers makes of them on loading.

transformers 5 renames tensors when it loads them, fuses experts that lie on disk one by one, and cuts, joins or
permutes others. The common conversions are known here. Any other one moves numbers and computes nothing, so
transformers itself runs it once, on numbered elements, which tells where each element of a loaded weight lies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_export.adapters.kind import is_float64
from lora_export.contracts import TargetUpdate, Update
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
COPIES = 16  # of a block, counted in fp32: its numbers, their places in int64, and both again

# Conversions that leave the first of three dimensions, the experts, as it is.
_WITHIN_EXPERTS = frozenset({"Interleave", "Chunk", "Concatenate"})


@dataclass(frozen=True)
class Group:
    """Tensors on disk that one conversion makes into weights of the loaded model.

    sources: name → the pattern of transformers that it matched, in the order in which transformers collects them;
    key: the name under which transformers converts them; converter, model: transformers' own.
    """

    sources: Mapping[str, str]
    key: str
    converter: Any
    model: Any

    def convert(self, tensors: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
        """The loaded weights by name, of tensors for all of `sources`."""
        own = self.converter
        fresh = own.copy(own._original_source_patterns, own._original_target_patterns, operations=own.operations)
        for name, pattern in self.sources.items():
            fresh.collected_tensors[pattern].append(tensors[name])
        weights: dict[str, torch.Tensor] = fresh.convert(self.key, model=self.model, config=self.model.config)
        return weights

    def shapes(self, stored: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shapes of the loaded weights. Whatever transformers raises for tensors that it cannot convert."""
        import torch

        blank = {name: torch.empty(stored[name], device="meta") for name in self.sources}
        return {name: tuple(value.shape) for name, value in self.convert(blank).items()}

    def by_expert(self, stored: Mapping[str, Shape]) -> bool:
        """Whether each expert of the one tensor is converted by itself, so that blocks of experts may be given."""
        alone = len(self.sources) == 1 and all(len(stored[name]) == 3 for name in self.sources)
        return alone and all(type(o).__name__ in _WITHIN_EXPERTS and o.dim > 0 for o in self.converter.operations)

    def places(self, loaded: str, disk: str, stored: Mapping[str, Shape]) -> "torch.Tensor":
        """For each element of a loaded weight its place in a tensor on disk, −1 where it lies in another one.

        int64, of the loaded weight's shape; of one expert where they are converted apart.
        """
        import torch

        numbered, start, mine = {}, 0, 0
        for name in self.sources:
            shape = (1, *stored[name][1:]) if self.by_expert(stored) else stored[name]
            size = math.prod(shape)
            numbered[name] = torch.arange(start, start + size).reshape(shape)
            mine = start if name == disk else mine
            start += size
        places = self.convert(numbered)[loaded] - mine
        size = math.prod(stored[disk][1:]) if self.by_expert(stored) else math.prod(stored[disk])
        return torch.where((places >= 0) & (places < size), places, -1)


@dataclass(frozen=True)
class StoredPiece:
    """A tensor on disk and its place in the loaded weight: all of it, or rows of one expert.

    expert: index in the first dimension, None if the tensor is the whole weight; part: which of the tensors that
    are concatenated in the second dimension; transposed: the last two dimensions are swapped on loading. group: of
    any other conversion, what it makes of which tensors; loaded: the shape of the loaded weight.
    """

    name: str
    expert: int | None = None
    part: int = 0
    transposed: bool = False
    group: Group | None = None
    loaded: Shape = ()


def stored_piece(name: str, pattern: str, converter: Any, earlier: Sequence[StoredPiece]) -> StoredPiece | None:
    """The place of a tensor in what the converter makes, as a common conversion has it; None for all others."""
    operations = [type(o).__name__ for o in converter.operations]
    part = converter.source_patterns.index(pattern)
    if operations == ["MergeModulelist"] or (
        operations == ["MergeModulelist", "Concatenate"] and converter.operations[1].dim == 1
    ):
        return StoredPiece(name, sum(p.part == part for p in earlier), part)
    if operations == ["Transpose"] and not earlier and not converter.operations[0].check_dims:
        return StoredPiece(name, transposed=True)
    return None


def spread(
    update: TargetUpdate, pieces: tuple[StoredPiece, ...], weights: Mapping[str, Shape]
) -> list[TargetUpdate]:
    """One update of a loaded weight as updates of the tensors on disk. AdapterError if it does not fit them."""
    first = pieces[0]
    if first.group is not None:
        return _spread_converted(update, first.group, first.loaded, weights)
    if first.expert is None and not first.transposed:
        return [replace(update, target=first.name)]
    shape, offsets = _fused(pieces, weights)
    if not update.fits(shape):
        raise _misfit(update, shape)
    return [_for_piece(update, piece, shape, offsets[piece.part], weights[piece.name]) for piece in pieces]


def _misfit(update: TargetUpdate, loaded: Shape) -> AdapterError:
    return AdapterError(
        f"the adapter's {update.kind} fits a weight of shape {list(update.shapes[0])}, "
        f"the loaded model has {list(loaded)}",
        tensor=update.target,
        expected="the base that the adapter was trained on",
    )


def _fused(pieces: Sequence[StoredPiece], weights: Mapping[str, Shape]) -> tuple[Shape, list[int]]:
    """The shape of the loaded weight, and where each concatenated part begins in its second dimension."""
    if pieces[0].transposed:
        *front, rows, columns = weights[pieces[0].name]
        return (*front, columns, rows), [0]
    of_first = sorted((p for p in pieces if p.expert == 0), key=lambda p: p.part)
    heights = [weights[p.name][0] for p in of_first]
    offsets = [sum(heights[:i]) for i in range(len(heights))]
    experts = sum(p.part == 0 for p in pieces)
    return (experts, sum(heights), *weights[of_first[0].name][1:]), offsets


def _for_piece(update: TargetUpdate, piece: StoredPiece, shape: Shape, offset: int, stored: Shape) -> TargetUpdate:
    def load(_: Shape) -> Update:
        whole = _load(update, shape, is_float64())
        if piece.transposed:
            return TransposedUpdate(whole)
        assert piece.expert is not None
        return ExpertUpdate(whole, piece.expert, offset, shape[1])

    def row_wise(_: Shape) -> bool:
        return not piece.transposed or update.row_wise(shape)

    return replace(update, target=piece.name, shapes=(stored,), load=load, row_wise=row_wise, low_rank=False)


def _spread_converted(
    update: TargetUpdate, group: Group, loaded: Shape, weights: Mapping[str, Shape]
) -> list[TargetUpdate]:
    """One update of a loaded weight as updates of the tensors on disk. AdapterError if it does not fit, or if it
    takes numbers of several tensors to compute one.
    """
    if not update.fits(loaded):
        raise _misfit(update, loaded)
    if len(group.sources) > 1 and not (update.adds or update.replaces):
        raise AdapterError(
            f"{len(group.sources)} tensors on disk make this weight, and {update.kind} computes with all of them",
            tensor=update.target,
            expected="a base in which the weight is one tensor, as transformers saves the loaded model",
            next_step="AutoModel.from_pretrained(BASE).save_pretrained(NEW, save_original_format=False)",
        )
    return [_for_tensor(update, group, loaded, disk, weights) for disk in group.sources]


def _for_tensor(
    update: TargetUpdate, group: Group, loaded: Shape, disk: str, weights: Mapping[str, Shape]
) -> TargetUpdate:
    apart = group.by_expert(weights)

    def load(_: Shape) -> "ConvertedUpdate":
        return ConvertedUpdate(update.load(loaded), group.places(update.target, disk, weights), apart)

    def row_wise(_: Shape) -> bool:
        return apart and update.row_wise(loaded)

    return replace(
        update, target=disk, shapes=(weights[disk],), load=load, row_wise=row_wise, low_rank=False, replaces=False,
        copies=max(update.copies, COPIES),
    )  # fmt: skip


@lru_cache(maxsize=4)  # the experts of a layer come in sequence, and all need the same matrices
def _load(update: TargetUpdate, shape: Shape, wide: bool) -> Update:
    return update.load(shape)


@dataclass(frozen=True)
class ExpertUpdate:
    """A sum (no rescaling) on a fused weight (experts, height, width), seen from the rows of one expert."""

    whole: Update
    expert: int
    offset: int
    height: int

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        mine = slice(self.offset + rows.start, self.offset + rows.start + weight.shape[0])
        part = getattr(self.whole, "part", None)
        if part is not None and weight.element_size() == 8:  # in float64 a few rows are wanted
            few: torch.Tensor = part(weight, self.expert, mine)
            return few
        fused = weight.new_zeros(1, self.height, *weight.shape[1:])
        fused[0, mine] = weight
        return self.whole.apply(fused, slice(self.expert, self.expert + 1))[0, mine]


@dataclass(frozen=True)
class TransposedUpdate:
    """An update of a weight whose last two dimensions are swapped on disk."""

    whole: Update

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.whole.apply(weight.transpose(-2, -1), rows).transpose(-2, -1).contiguous()


@dataclass(frozen=True)
class ConvertedUpdate:
    """An update of a loaded weight, seen from a tensor on disk that holds some of its elements.

    places: as of `Group.places`; by_expert: they are those of one expert, and blocks of experts are given.
    """

    whole: Update
    places: "torch.Tensor"
    by_expert: bool

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        places = self.places.to(weight.device)
        if self.by_expert:
            size = math.prod(weight.shape[1:])
            starts = torch.arange(len(weight), device=weight.device).mul(size)[:, None, None]
            places = torch.where(places >= 0, places + starts, -1)
        here = places >= 0
        flat = weight.reshape(-1)
        loaded = torch.where(here, flat[places.clamp(min=0)], 0)
        changed = self.whole.apply(loaded, rows if self.by_expert else slice(0, len(loaded)))
        result = flat.clone()
        result[places[here]] = changed.reshape(places.shape)[here]
        return result.reshape(weight.shape)
