"""Super-Tuning (arXiv:2607.09287): W' = W + the trained values at chosen places of W, and Supra, + α/r·B·A."""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from lora_export.adapters.config import number, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import LowRank
from lora_export.adapters.parts import Layered, Shapes, layered
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "Super-Tuning"
PEFT_TYPES = ("SUPERTUNING",)
FORMULA = "W + values at places of W (+ α/r·B·A)"

_PLACES, _VALUES, _A, _B = (f"supertuning_{part}" for part in ("indices", "values", "lora_A", "lora_B"))

# What makes PEFT save the places that it was told to leave out.
_SAVE_THEM = (
    "on the machine of the training: m = PeftModel.from_pretrained(BASE_MODEL, ADAPTER); "
    "[b._non_persistent_buffers_set.clear() for n, b in m.named_modules() if n.endswith('supertuning_indices')]; "
    "m.peft_config['default'].save_precomputed_indices = True; m.save_pretrained(DIR)"
)


@dataclass(frozen=True)
class SparseUpdate:
    """values added at flat places of the whole weight, and a low-rank delta, if there is one.

    values: fp32 (n,); places: int64 (n,), in rising order; width: elements of a row.
    """

    values: "torch.Tensor"
    places: "torch.Tensor"
    width: int
    low_rank: LowRank | None

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        if self.low_rank is not None:
            weight = self.low_rank.added_to(weight, rows).reshape(weight.shape)
        start = rows.start * self.width
        ends = torch.tensor([start, start + weight.numel()], device=self.places.device)
        first, last = torch.searchsorted(self.places, ends).tolist()
        weight.view(-1).index_add_(0, self.places[first:last] - start, self.values[first:last])
        return weight


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. AdapterError where the places were not saved."""
    found = layered(file, (_PLACES, _VALUES, _A, _B))
    if found and not all(_PLACES in layer.keys for layer in found):
        raise file.refuse(
            "the places of the trained values were not saved (save_precomputed_indices is false): PEFT finds them "
            "again by the size of the base's numbers, and among equal ones by chance",
            tensor=next(layer.name for layer in found if _PLACES not in layer.keys),
            expected="an adapter with supertuning_indices",
            next_step=_SAVE_THEM,
        )
    if found and file.config.get("save_precomputed_indices") is False:
        raise file.refuse(
            "save_precomputed_indices is false, but the file holds places, which PEFT would not use",
            tensor=found[0].keys[_PLACES],
            expected="save_precomputed_indices: true, or a file without supertuning_indices",
        )
    rank = whole(file.config, "r", file.where) if file.config.get("r") is not None else 0
    alpha = number(file.config, "lora_alpha", file.where) if rank else 0.0
    return [_update(layer, rank, alpha) for layer in found]


def _update(layer: Layered, rank: int, alpha: float) -> TargetUpdate:
    layer.need(_VALUES, *((_A, _B) if rank else ()))
    places, values = layer.shape(_PLACES), layer.shape(_VALUES)
    a, b = (layer.shape(m) if m in layer.keys else () for m in (_A, _B))
    low = [(n, m) for n, m in zip((a, b), (0, 1), strict=True) if n]
    if (
        len(places) != 1
        or places != values
        or bool(low) != bool(rank)
        or any(len(shape) != 2 or shape[dimension] != rank for shape, dimension in low)
    ):
        raise layer.disagree(
            *layer.keys, expected=f"as many values as places, A ({rank}, in) and B (out, {rank}) where r is set"
        )

    def load(shape: tuple[int, ...]) -> SparseUpdate:
        import torch

        flat, order = torch.sort(layer.integers(_PLACES, prod(shape)))
        low_rank = None
        if rank:
            low_rank = LowRank(layer.read(_B), layer.read(_A), layer.file.weight * alpha / rank)
        return SparseUpdate(layer.file.weight * layer.read(_VALUES)[order], flat, shape[1], low_rank)

    shapes: Shapes = ((b[0], a[1]),) if rank else ((None, None),)
    return TargetUpdate(f"{layer.name}.weight", "supertuning", layer.used, shapes, load, adds=True)
