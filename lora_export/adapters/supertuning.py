"""Super-Tuning (arXiv:2607.09287): W' = W + the trained values at chosen places of W, and Supra, + α/r·B·A."""

from dataclasses import dataclass
from math import prod

import torch

from lora_export.adapters.config import Number, Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, Shapes, modules
from lora_export.adapters.updates import LowRank
from lora_export.contracts import TargetUpdate

NAME = "Super-Tuning"
FORMULA = "W + values at places of W (+ α/r·B·A)"

_PLACES, _VALUES, _A, _B = (f"supertuning_{part}" for part in ("indices", "values", "lora_A", "lora_B"))

# What makes PEFT save the places that it was told to leave out.
_SAVE_THEM = (
    "on the machine of the training: m = PeftModel.from_pretrained(BASE_MODEL, ADAPTER); "
    "[b._non_persistent_buffers_set.clear() for n, b in m.named_modules() if n.endswith('supertuning_indices')]; "
    "m.peft_config['default'].save_precomputed_indices = True; m.save_pretrained(DIR)"
)


@dataclass(frozen=True)
class SuperUpdate:
    """values added at flat places of the whole weight, and a low-rank delta, if there is one.

    values: fp32 (n,); places: int64 (n,), in rising order; width: elements of a row.
    """

    values: torch.Tensor
    places: torch.Tensor
    width: int
    low_rank: LowRank | None

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        if self.low_rank is not None:
            weight = self.low_rank.added_to(weight, rows).reshape(weight.shape)
        start = rows.start * self.width
        ends = torch.tensor([start, start + weight.numel()], device=self.places.device)
        first, last = torch.searchsorted(self.places, ends).tolist()
        weight.view(-1).index_add_(0, self.places[first:last] - start, self.values[first:last])
        return weight


@dataclass(frozen=True)
class Settings:
    """r: of Supra's low-rank delta, null without one."""

    r: Positive | None = None
    lora_alpha: Number | None = None
    save_precomputed_indices: bool = True


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. AdapterError where the places were not saved."""
    settings, adapted = file.settings(Settings), modules(file, _PLACES, _VALUES, _A, _B)
    without = next((module for module in adapted if _PLACES not in module.keys), None)
    if without is not None:
        raise file.refuse(
            "the places of the trained values were not saved (save_precomputed_indices is false): PEFT finds them "
            "again by the magnitude of the base's weights, and picks among equal ones at random",
            tensor=without.name,
            expected="an adapter with supertuning_indices",
            next_step=_SAVE_THEM,
        )
    if adapted and not settings.save_precomputed_indices:
        raise file.refuse(
            "save_precomputed_indices is false, but the file holds places, which PEFT would not use",
            tensor=adapted[0].keys[_PLACES],
            expected="save_precomputed_indices: true, or a file without supertuning_indices",
        )
    if settings.r and settings.lora_alpha is None:
        raise file.refuse("lora_alpha is None", expected="a number, as r is set")
    return [_update(module, settings) for module in adapted]


def _update(module: AdaptedModule, settings: Settings) -> TargetUpdate:
    rank = settings.r
    module.need(_VALUES, *((_A, _B) if rank else ()))
    a, b = (module.shape(m) if m in module.keys else () for m in (_A, _B))
    low_rank = len(a) == len(b) == 2 and a[0] == b[1] == rank
    places = module.shape(_PLACES)
    if len(places) != 1 or places != module.shape(_VALUES) or (not low_rank if rank else a or b):
        raise module.disagree(
            "as many values as places, A (r, in) and B (out, r) where r is set", also=f"r is {rank}"
        )

    def load(shape: tuple[int, ...]) -> SuperUpdate:
        flat, order = torch.sort(module.indices(_PLACES, prod(shape)))
        factor, delta = module.file.weight, None
        if rank:
            delta = LowRank(module.read(_B), module.read(_A), factor * (settings.lora_alpha or 0.0) / rank)
        return SuperUpdate(factor * module.read(_VALUES)[order], flat, shape[1], delta)

    shapes: Shapes = ((b[0], a[1]),) if rank else ((None, None),)
    return TargetUpdate(module.weight, "supertuning", module.used, shapes, load, adds=True)
