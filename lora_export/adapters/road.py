"""RoAd (arXiv:2409.00119, eq. 4): W' = R·W and b' = R·b, R turning and stretching outputs in pairs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.complete import complete
from lora_export.adapters.config import whole
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "RoAd"
PEFT_TYPES = ("ROAD",)
FORMULA = "R·W and R·b, R of blocks α·(cos θ, −sin θ; sin θ, cos θ) on outputs half a group apart"

_PARTS = ("road_theta", "road_alpha")
_NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}  # variant → numbers for each pair of outputs


@dataclass(frozen=True)
class PairsUpdate:
    """row·same + partner·other, the partner of the first half of a group with its sign turned.

    same, other: fp32 (outputs,); group: outputs that belong together, each with the one half a group away.
    """

    same: "torch.Tensor"
    other: "torch.Tensor"
    group: int

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self._summed(weight, -1.0)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """The same sum with all its numbers taken as positive."""
        return PairsUpdate(self.same.abs(), self.other.abs(), self.group)._summed(terms, 1.0)

    def _summed(self, weight: "torch.Tensor", sign: float) -> "torch.Tensor":
        import torch

        first, second = weight.reshape(-1, 2, self.group // 2, *weight.shape[1:]).unbind(1)
        partner = torch.stack([sign * second, first], 1).reshape(weight.shape)
        wide = (-1, *(1 for _ in weight.shape[1:]))
        return self.same.reshape(wide) * weight + self.other.reshape(wide) * partner


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each linear layer's weight, and one for its bias, if it has one."""
    modules = complete(file, _PARTS)
    if not modules:
        return []
    file.refuse_weight(NAME)
    variant, group = file.config.get("variant"), whole(file.config, "group_size", file.where)
    if variant not in _NUMBERS or group % 2:
        raise file.refuse(
            f"variant is {variant!r}, group_size {group}",
            expected="road_1, road_2 or road_4, and an even group_size",
        )
    found = []
    for name, keys in modules.items():
        found += _updates(file, name, keys, str(variant), group)
    return found


def _updates(file: AdapterFile, name: str, keys: dict[str, str], variant: str, group: int) -> list[TargetUpdate]:
    sizes = [file.shape(keys[p], 1)[0] for p in _PARTS]
    outputs = sizes[0] * 2 // _NUMBERS[variant]
    if sizes[0] != sizes[1] or sizes[0] * 2 % _NUMBERS[variant] or outputs % group:
        raise file.refuse(
            f"road_theta has {sizes[0]} values, road_alpha {sizes[1]}; variant {variant}, group_size {group}",
            tensor=keys[_PARTS[0]],
            expected="equally many, for outputs that are a multiple of group_size",
        )

    def load(_: tuple[int, ...]) -> PairsUpdate:
        theta, alpha = (file.read(keys[p]) for p in _PARTS)
        same, other = _columns(variant, group, theta.double(), alpha.double())
        return PairsUpdate(same.to(theta.dtype), other.to(theta.dtype), group)

    def whole_only(_: tuple[int, ...]) -> bool:
        return False

    used = tuple(keys[p] for p in _PARTS)
    weight = TargetUpdate(f"{name}.weight", "road", used, ((outputs, None),), load, row_wise=whole_only)
    bias = TargetUpdate(f"{name}.bias", "road", (), ((outputs,),), load, row_wise=whole_only, optional=True)
    return [weight, bias]


def _columns(
    variant: str, group: int, theta: "torch.Tensor", alpha: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(α·cos θ, α·sin θ) for each output: of its pair (road_1), its own (road_2), one for either (road_4)."""
    if variant == "road_4":  # a group's numbers of the cosine, then those of the sine
        theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        same, other = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
        return same.flatten(), other.flatten()
    same, other = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_1":
        same, other = (x.reshape(-1, 1, group // 2).expand(-1, 2, -1).flatten() for x in (same, other))
    return same, other
