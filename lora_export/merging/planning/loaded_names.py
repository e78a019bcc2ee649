"""From the names of a loaded model, which adapters use, to the tensors on disk, where transformers converts.

transformers 5 renames tensors when it loads them, and fuses experts that lie on disk one by one. Its own table of
conversions (transformers.conversion_mapping) is asked, on a model without weights.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from lora_export.adapters.kind import is_float64
from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import TargetUpdate, Update
from lora_export.errors import AdapterError, CheckpointError
from lora_export.merging.architecture.converted import Group, group_of, spread_converted

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Kind = Literal["float", "whole", "passed over"]


@dataclass(frozen=True)
class Piece:
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


def loaded_weights(base: Checkpoint, weights: Mapping[str, Shape]) -> dict[str, tuple[Piece, ...]]:
    """Name in the loaded model → the tensors on disk that make it; empty where transformers knows no conversion."""
    try:
        model, _ = conversions(base)
        return loaded_by(model, weights)
    except (CheckpointError, ImportError, AttributeError):
        return {}


def loaded_by(model: Any, weights: Mapping[str, Shape]) -> dict[str, tuple[Piece, ...]]:
    """The same for a model that is built already."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)  # anew each time: some remember what they have seen
    renamings = [c for c in table if isinstance(c, WeightRenaming)]
    converters = [c for c in table if isinstance(c, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    meta, found, groups = model.state_dict(), dict[str, list[Piece]](), dict[str, Group]()
    for name in sorted(weights, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, meta)
        pieces = found.setdefault(target, [])
        piece = Piece(name) if pattern is None else _piece(name, pattern, by_pattern[pattern], pieces)
        if piece is not None:
            pieces.append(piece)
        elif pattern is not None:
            groups[target] = group_of(name, pattern, target, by_pattern[pattern], model, groups.get(target))
    whole = {target: tuple(pieces) for target, pieces in found.items() if pieces}
    return whole | _of_groups(groups, weights)


def _of_groups(groups: Mapping[str, Group], weights: Mapping[str, Shape]) -> dict[str, tuple[Piece, ...]]:
    found: dict[str, tuple[Piece, ...]] = {}
    for group in groups.values():
        try:
            shapes = group.shapes(weights)
        except Exception:  # tensors of other shapes than it expects: then there are no names for them
            continue
        for loaded, shape in shapes.items():
            found[loaded] = tuple(Piece(name, group=group, loaded=shape) for name in group.sources)
    return found


def kinds_in_model(base: Checkpoint, names: Iterable[str]) -> dict[str, Kind] | None:
    """Name of a tensor on disk → what the loaded model has for it, or that transformers knows it and passes it
    over; None where transformers cannot build the model."""
    try:
        model, table = conversions(base)
    except (CheckpointError, ImportError, AttributeError):
        return None
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [c for c in table if isinstance(c, WeightRenaming)]
    converters = [c for c in table if isinstance(c, WeightConverter)]
    meta, found = model.state_dict(), dict[str, Kind]()
    passed_over = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    for name in names:
        target = rename_source_key(name, renamings, converters, model.base_model_prefix, meta)[0]
        if target in meta:
            found[name] = "float" if meta[target].is_floating_point() else "whole"
        elif any(re.search(pattern, name) for pattern in passed_over):
            found[name] = "passed over"
    return found


def conversions(base: Checkpoint) -> tuple[Any, list[Any]]:
    """(the model without weights, what transformers does to names and tensors on loading it)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from lora_export import meta_model as skeleton

    model = skeleton.build(base.folder, base.config)
    return model, get_model_conversion_mapping(model)


def _piece(name: str, pattern: str, converter: Any, earlier: list[Piece]) -> Piece | None:
    """The place of a tensor in what the converter makes, as the common conversions tell it; None for all others."""
    operations = [type(o).__name__ for o in converter.operations]
    part = converter.source_patterns.index(pattern)
    if operations == ["MergeModulelist"] or (
        operations == ["MergeModulelist", "Concatenate"] and converter.operations[1].dim == 1
    ):
        return Piece(name, sum(p.part == part for p in earlier), part)
    if operations == ["Transpose"] and not earlier and not converter.operations[0].check_dims:
        return Piece(name, transposed=True)
    return None


def spread(update: TargetUpdate, pieces: tuple[Piece, ...], weights: Mapping[str, Shape]) -> list[TargetUpdate]:
    """One update of a loaded weight as updates of the tensors on disk. AdapterError if it does not fit them."""
    first = pieces[0]
    if first.group is not None:
        return spread_converted(update, first.group, first.loaded, weights)
    if first.expert is None and not first.transposed:
        return [replace(update, target=first.name)]
    shape, offsets = _fused(pieces, weights)
    if not update.fits(shape):
        raise _misfit(update, shape)
    return [_for_piece(update, piece, shape, offsets[piece.part], weights[piece.name]) for piece in pieces]


def _misfit(update: TargetUpdate, shape: Shape) -> AdapterError:
    return AdapterError(
        f"the adapter's {update.kind} fits a weight of shape {list(update.shapes[0])}, "
        f"the loaded model has {list(shape)}",
        tensor=update.target,
        expected="the base that the adapter was trained on",
    )


def _fused(pieces: tuple[Piece, ...], weights: Mapping[str, Shape]) -> tuple[Shape, list[int]]:
    """The shape of the loaded weight, and where each concatenated part begins in its second dimension."""
    if pieces[0].transposed:
        *front, rows, columns = weights[pieces[0].name]
        return (*front, columns, rows), [0]
    of_first = sorted((p for p in pieces if p.expert == 0), key=lambda p: p.part)
    heights = [weights[p.name][0] for p in of_first]
    offsets = [sum(heights[:i]) for i in range(len(heights))]
    experts = sum(p.part == 0 for p in pieces)
    return (experts, sum(heights), *weights[of_first[0].name][1:]), offsets


def _for_piece(update: TargetUpdate, piece: Piece, shape: Shape, offset: int, stored: Shape) -> TargetUpdate:
    def load(_: Shape) -> Update:
        whole = _load(update, shape, is_float64())
        if piece.transposed:
            return TransposedUpdate(whole)
        assert piece.expert is not None
        return ExpertUpdate(whole, piece.expert, offset, shape[1])

    def row_wise(_: Shape) -> bool:
        return not piece.transposed or update.row_wise(shape)

    return replace(update, target=piece.name, shapes=(stored,), load=load, row_wise=row_wise, low_rank=False)


@lru_cache(maxsize=4)  # the experts of a layer follow each other, and each needs the same matrices
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
        if part is not None and weight.element_size() == 8:  # in float64 a few rows are asked for
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
