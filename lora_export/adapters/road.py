"""RoAd (arXiv:2409.00119, eq. 4): W' = R·W and b' = R·b, R turning and stretching outputs in pairs."""

from dataclasses import dataclass
from typing import Literal

import torch

from lora_export.adapters.config import Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.updates import WholeTarget
from lora_export.contracts import TargetUpdate

NAME = "RoAd"
FORMULA = "R·W and R·b, R of blocks α·(cos θ, −sin θ; sin θ, cos θ) on outputs half a group apart"

_PARTS = ("road_theta", "road_alpha")
_NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}  # variant → numbers for each pair of outputs


@dataclass(frozen=True)
class PairsUpdate:
    """row·same + partner·other, the partner of the first half of a group with its sign turned.

    same, other: fp32 (outputs,); group: outputs that belong together, each with the one half a group away.
    """

    same: torch.Tensor
    other: torch.Tensor
    group: int

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return self._summed(weight, -1.0)

    def terms(self, weight: torch.Tensor, terms: torch.Tensor, rows: slice) -> torch.Tensor:
        """The same sum with all its numbers taken as positive."""
        return PairsUpdate(self.same.abs(), self.other.abs(), self.group)._summed(terms, 1.0)

    def _summed(self, weight: torch.Tensor, sign: float) -> torch.Tensor:
        first, second = weight.reshape(-1, 2, self.group // 2, *weight.shape[1:]).unbind(1)
        partner = torch.stack([sign * second, first], 1).reshape(weight.shape)
        wide = (-1, *(1 for _ in weight.shape[1:]))
        return self.same.reshape(wide) * weight + self.other.reshape(wide) * partner


@dataclass(frozen=True)
class Settings:
    """variant: how many numbers there are for each pair of outputs."""

    variant: Literal["road_1", "road_2", "road_4"]
    group_size: Positive


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each linear layer's weight, and one for its bias, if it has one."""
    file.refuse_weight(NAME)
    settings = file.settings(Settings)
    if settings.group_size % 2:
        raise file.refuse(f"group_size is {settings.group_size}", expected="an even group_size")
    return [update for module in complete(file, *_PARTS) for update in _updates(module, settings)]


def _updates(module: AdaptedModule, settings: Settings) -> list[TargetUpdate]:
    variant, group = settings.variant, settings.group_size
    (angles,), (stretches,) = (module.file.shape(module.keys[p], 1) for p in _PARTS)
    outputs, rest = divmod(angles * 2, _NUMBERS[variant])
    if angles != stretches or rest or outputs % group:
        raise module.disagree(
            "equally many, for outputs that are a multiple of group_size", also=f"{variant}, group_size {group}"
        )

    def load(_: tuple[int, ...]) -> PairsUpdate:
        theta, alpha = (module.read(p) for p in _PARTS)
        same, other = _columns(variant, group, theta.double(), alpha.double())
        return PairsUpdate(same.to(theta.dtype), other.to(theta.dtype), group)

    weight = WholeTarget(module.weight, "road", module.used, ((outputs, None),), load)
    bias = WholeTarget(module.bias, "road", (), ((outputs,),), load, optional=True)
    return [weight, bias]


def _columns(
    variant: str, group: int, theta: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(α·cos θ, α·sin θ) for each output: of its pair (road_1), its own (road_2), one for either (road_4)."""
    if variant == "road_4":  # a group's numbers of the cosine, then those of the sine
        theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        same, other = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
        return same.flatten(), other.flatten()
    same, other = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_1":
        same, other = (x.reshape(-1, 1, group // 2).expand(-1, 2, -1).flatten() for x in (same, other))
    return same, other
