"""LoHa (FedPara, arXiv:2108.06098, eq. 3): W' = W + s·(W1a·W1b) ⊙ (W2a·W2b), s = alpha/r."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.kind import AdapterFile, FlatTarget
from lora_export.adapters.lycoris import Parts, product, read_parts
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "LoHa"
PEFT_TYPES = ("LOHA",)
FORMULA = "W + s·(W1a·W1b) ⊙ (W2a·W2b); convolutions may have a core: the products are then Tucker products"

_PLAIN = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True)
class HadamardUpdate:
    """The element-wise product of two low-rank matrices; left: fp32 (outputs, r), right: fp32 (r, rest)."""

    left: tuple["torch.Tensor", "torch.Tensor"]
    right: tuple["torch.Tensor", "torch.Tensor"]
    scaling: float

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        first, second = (a[rows] @ b for a, b in zip(self.left, self.right, strict=True))
        return weight + self.scaling * (first * second).reshape(weight.shape)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each module; shapes are checked against the base's weight when it is known."""
    sets = (frozenset(_PLAIN), frozenset(_PLAIN + _CORES))
    return [_update(parts) for parts in read_parts(file, _PLAIN + _CORES, sets)]


def _update(parts: Parts) -> TargetUpdate:
    cores = _CORES[0] in parts.keys
    for part in _PLAIN:
        parts.check(part, 0 if cores or part.endswith("_b") else 1)
    for part in parts.keys:
        other = part.replace("1", "2")
        if parts.shape(part) != parts.shape(other):
            raise parts.file.refuse(
                f"{part} has the shape {list(parts.shape(part))}, {other} has {list(parts.shape(other))}",
                tensor=parts.keys[part],
                expected="two products of the same shape",
            )
    outputs = parts.shape("hada_w1_a")[1 if cores else 0]
    rest = parts.shape("hada_w1_b")[1]
    if cores:
        kernel = parts.shape("hada_t1")[2:]
        for n in kernel:
            rest *= n

    def load(shape: tuple[int, ...]) -> HadamardUpdate:
        left, right = zip(*(_factors(parts, n) for n in ("1", "2")), strict=True)
        return HadamardUpdate(left, right, parts.scaling)

    used = tuple(parts.keys.values())
    return FlatTarget(f"{parts.module}.weight", "loha", used, ((outputs, rest),), load, adds=True)


def _factors(parts: Parts, number: str) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(outputs, r) and (r, rest). With a core t (r, r, kernel…): Σ_j t[i, j, …]·b[j, channel] for the right one."""
    a, b = (parts.file.read(parts.keys[f"hada_w{number}_{side}"]) for side in "ab")
    core = parts.keys.get(f"hada_t{number}")
    if core is None:
        return a, b
    t = parts.file.read(core)
    return a.T, product("ij...,jc->ic...", t, b).flatten(1)
