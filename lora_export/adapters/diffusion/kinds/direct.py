"""Tensors that are added to a weight or a bias as they are, or that replace it."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.diffusion.kinds.module import Trained, Whole
from lora_export.adapters.diffusion.pieces import Shape
from lora_export.adapters.kind import AdapterFile, float64
from lora_export.adapters.saved import Replacement

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AddedRows:
    """weight + scaling · addend, which is read as far as it is asked for."""

    file: AdapterFile
    key: str
    scaling: float

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return weight + self._addend(weight, rows)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return terms + self._addend(weight, rows).abs()

    def _addend(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        with float64() if weight.dtype == torch.float64 else contextlib.nullcontext():
            value = self.file.read(self.key, rows)
        return self.scaling * value.reshape(weight.shape).to(weight)


def added(trained: Trained, part: str, leaf: str, kind: str) -> Whole:
    """weight + value, times the user's factor."""
    key, shape = trained.module.keys[part], trained.shape(part)
    file = trained.file
    if not shape:
        raise trained.disagree("a value for each row", part)

    def load(_: Shape) -> AddedRows:
        return AddedRows(file, key, file.weight)

    return Whole(kind, (part,), shape[0], shape[1:], load, leaf=leaf, adds=True)


def beside(trained: Trained) -> list[Whole]:
    """A bias that was trained with the weight, whatever the weight's kind is."""
    return [added(trained, "diff_b", "bias", "bias")] if trained.has("diff_b") else []


def read_full(trained: Trained) -> list[Whole]:
    """W + diff, bias + diff_b."""
    return [added(trained, "diff", "weight", "full"), *beside(trained)]


def read_bias(trained: Trained) -> list[Whole]:
    return beside(trained)


def read_parameter(trained: Trained) -> list[Whole]:
    """parameter + value, of one that is no layer's weight (Wan's `modulation`)."""
    return [added(trained, "diff_m", "weight", "parameter")]


def read_norm(trained: Trained) -> list[Whole]:
    """weight + w_norm, bias + b_norm, of LayerNorm, GroupNorm and RMSNorm."""
    leaves = (("w_norm", "weight"), ("b_norm", "bias"))
    return [added(trained, part, leaf, "norm") for part, leaf in leaves if trained.has(part)]


def read_set(trained: Trained) -> list[Whole]:
    """The value itself in place of the weight."""
    key, shape = trained.module.keys["set_weight"], trained.shape("set_weight")
    trained.file.refuse_weight("a value that replaces the base's", key)
    if not shape:
        raise trained.disagree("a value for each row", "set_weight")

    def load(_: Shape) -> Replacement:
        return Replacement(trained.file, key)

    return [Whole("set", ("set_weight",), shape[0], shape[1:], load, replaces=True)]
