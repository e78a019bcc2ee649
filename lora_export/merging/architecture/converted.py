"""Weights that transformers makes of tensors on disk by a conversion by whatever moves numbers.

A conversion moves numbers and computes nothing. So transformers itself runs it once, on numbered elements. That
tells for each element of a loaded weight where it lies on disk.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
        found: dict[str, torch.Tensor] = fresh.convert(self.key, model=self.model, config=self.model.config)
        return found

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
        found = self.convert(numbered)[loaded] - mine
        size = math.prod(stored[disk][1:]) if self.by_expert(stored) else math.prod(stored[disk])
        return torch.where((found >= 0) & (found < size), found, -1)


def spread_converted(
    update: TargetUpdate, group: Group, loaded: Shape, weights: Mapping[str, Shape]
) -> list[TargetUpdate]:
    """One update of a loaded weight as updates of the tensors on disk. AdapterError if it does not fit, or if it
    takes numbers of several tensors to compute one.
    """
    if not update.fits(loaded):
        raise AdapterError(
            f"the adapter's {update.kind} fits a weight of shape {list(update.shapes[0])}, "
            f"the loaded model has {list(loaded)}",
            tensor=update.target,
            expected="the base that the adapter was trained on",
        )
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


def group_of(name: str, pattern: str, key: str, converter: Any, model: Any, earlier: Group | None) -> Group:
    """The group with one tensor more."""
    sources = dict(earlier.sources) if earlier else {}
    return Group(sources | {name: pattern}, key, converter, model)
