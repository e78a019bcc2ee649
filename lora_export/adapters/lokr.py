"""LoKr (LyCORIS, arXiv:2309.14859, §3.3): W' = W + s·W1 ⊗ W2, each factor whole or decomposed, s = alpha/r."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lycoris import LycorisModule, product, read_modules
from lora_export.adapters.updates import FlatTarget
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "LoKr"
FORMULA = "W + s·W1 ⊗ W2 (Kronecker product); W1 and W2 may be products of low rank, W2 a Tucker product"

_FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
_MARKERS = tuple(sorted(set().union(*_FIRST, *_SECOND)))


@dataclass(frozen=True)
class KroneckerUpdate:
    """first: fp32 (a, c); second: fp32 (b, d). Row i of the delta is row i // b of the first, times row i % b of
    the second for each of its elements.
    """

    first: "torch.Tensor"
    second: "torch.Tensor"
    scaling: float

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        index = torch.arange(rows.start, rows.start + len(weight), device=weight.device)
        outer, inner = self.first[index // len(self.second)], self.second[index % len(self.second)]
        delta = outer[:, :, None] * inner[:, None, :]
        return weight + self.scaling * delta.reshape(weight.shape)


@dataclass(frozen=True)
class FlattenedKronecker:
    """PEFT's product of a matrix with the whole kernel (b, d, k) of a one-dimensional convolution.

    torch.kron puts the missing dimension of the matrix in front, so its rows meet the kernel's channels; that is no
    Kronecker product of channels, but it is what the trained model computes. It does not go row by row.
    """

    first: "torch.Tensor"
    second: "torch.Tensor"
    scaling: float

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        return weight + self.scaling * torch.kron(self.first, self.second).reshape(weight.shape)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each module; shapes are checked against the base's weight when it is known."""
    sets = tuple(first | second for first in _FIRST for second in _SECOND)
    return [_update(module) for module in read_modules(file, _MARKERS, sets)]


def _update(module: LycorisModule) -> TargetUpdate:
    for part, dimension in (("lokr_w1_a", 1), ("lokr_w1_b", 0), ("lokr_w2_b", 0)):
        if part in module.keys:
            module.check(part, dimension)
    if "lokr_w2_a" in module.keys:
        module.check("lokr_w2_a", 0 if "lokr_t2" in module.keys else 1)
    a, c = _size(module, "1")
    b, d = _size(module, "2")

    def load(shape: tuple[int, ...]) -> KroneckerUpdate | FlattenedKronecker:
        first, second = _factor(module, "1"), _factor(module, "2")
        if second.dim() == 3:
            return FlattenedKronecker(first, second, module.scaling)
        return KroneckerUpdate(first, second.flatten(1), module.scaling)

    shapes = ((a * b, c * d),)
    return FlatTarget(
        module.weight, "lokr", module.used, shapes, load, row_wise=lambda shape: len(shape) != 3, adds=True
    )


def _size(module: LycorisModule, number: str) -> tuple[int, int]:
    """(rows, all the rest) of a factor, from headers."""
    whole, core = f"lokr_w{number}", f"lokr_t{number}"
    if whole in module.keys:
        rows, *rest = module.shape(whole)
        return rows, math.prod(rest)
    a, b = module.shape(f"{whole}_a"), module.shape(f"{whole}_b")
    return (a[1], b[1] * math.prod(module.shape(core)[2:])) if core in module.keys else (a[0], b[1])


def _factor(module: LycorisModule, number: str) -> "torch.Tensor":
    whole, core = f"lokr_w{number}", f"lokr_t{number}"
    if whole in module.keys:
        return module.read(whole)
    a, b = module.read(f"{whole}_a"), module.read(f"{whole}_b")
    if core in module.keys:
        return product("ij...,io,jc->oc...", module.read(core), a, b)
    return product("ij,jk->ik", a, b)
