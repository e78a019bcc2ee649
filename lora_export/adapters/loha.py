"""LoHa (FedPara, arXiv:2108.06098, eq. 3): W' = W + s·(W1a·W1b) ⊙ (W2a·W2b), s = alpha/r."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lycoris import LycorisModule, product, read_modules
from lora_export.adapters.updates import FlatTarget
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "LoHa"
FORMULA = "W + s·(W1a·W1b) ⊙ (W2a·W2b); convolutions may have a core: the products are then Tucker products"

_PLAIN = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True)
class HadamardUpdate:
    """The element-wise product of two low-rank matrices, each of factors fp32 (outputs, r) and (r, rest)."""

    first: "tuple[torch.Tensor, torch.Tensor]"
    second: "tuple[torch.Tensor, torch.Tensor]"
    scaling: float

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        first, second = (a[rows] @ b for a, b in (self.first, self.second))
        return weight + self.scaling * (first * second).reshape(weight.shape)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each module; shapes are checked against the base's weight when it is known."""
    sets = (frozenset(_PLAIN), frozenset(_PLAIN + _CORES))
    return [_update(module) for module in read_modules(file, _PLAIN + _CORES, sets)]


def _update(module: LycorisModule) -> TargetUpdate:
    cores = _CORES[0] in module.keys
    for part in _PLAIN:
        module.check(part, 0 if cores or part.endswith("_b") else 1)
    for part in module.keys:
        other = part.replace("1", "2")
        if module.shape(part) != module.shape(other):
            raise module.disagree("two products of the same shape", part, other)
    outputs = module.shape("hada_w1_a")[1 if cores else 0]
    rest = module.shape("hada_w1_b")[1] * (math.prod(module.shape("hada_t1")[2:]) if cores else 1)

    def load(shape: tuple[int, ...]) -> HadamardUpdate:
        return HadamardUpdate(_factors(module, "1"), _factors(module, "2"), module.scaling)

    return FlatTarget(module.weight, "loha", module.used, ((outputs, rest),), load, adds=True)


def _factors(module: LycorisModule, number: str) -> "tuple[torch.Tensor, torch.Tensor]":
    """(outputs, r) and (r, rest). With a core t (r, r, kernel…): Σ_j t[i, j, …]·b[j, channel] for the right one."""
    a, b = (module.read(f"hada_w{number}_{side}") for side in "ab")
    core = f"hada_t{number}"
    if core not in module.keys:
        return a, b
    return a.T, product("ij...,jc->ic...", module.read(core), b).flatten(1)
