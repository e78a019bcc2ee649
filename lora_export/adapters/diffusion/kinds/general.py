"""GLoRA as LyCORIS has it (arXiv:2306.07967 without its other paths): W' = W + s·(W·A + B), A = a1·a2, B = b1·b2.

A mixes input channels, so each row is changed for itself. Files of older versions have the factors the other way
round: W·a2·a1 + b2·b1. Only the shapes tell.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.diffusion.kinds.module import Trained, Whole
from lora_export.adapters.diffusion.pieces import Shape

if TYPE_CHECKING:
    import torch

PARTS = ("a2", "a1", "b1", "b2")
COPIES = 10


@dataclass(frozen=True)
class InputMix:
    """weight + scaling · (weight·first·second over input channels + left·right).

    fp32; first (inputs, r), second (r, inputs), left (outputs, r), right (r, rest).
    """

    first: "torch.Tensor"
    second: "torch.Tensor"
    left: "torch.Tensor"
    right: "torch.Tensor"
    scaling: float

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        channels = weight.reshape(*weight.shape[:2], -1).transpose(1, 2)
        mixed = (channels @ self.first @ self.second).transpose(1, 2).reshape(weight.shape)
        return weight + self.scaling * (mixed + (self.left[rows] @ self.right).reshape(weight.shape))


def read_glora(trained: Trained) -> list[Whole]:
    """a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, kernel…); in old files the two of each pair change places."""
    new, old = _fits(trained, "a1", "a2", "b1", "b2"), _fits(trained, "a2", "a1", "b2", "b1")
    if new == old:
        both = "which is right in both orders: a1·a2 and b1·b2, or a2·a1 and b2·b1"
        said = ", ".join(f"{part} {list(trained.shape(part))}" for part in PARTS)
        raise trained.file.refuse(
            f"{said}, {both if new else 'which is GLoRA in neither order'} for a weight of "
            f"{list(trained.stored('weight'))}",
            tensor=trained.module.keys["a1"],
            expected="a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in); or the older order of each pair",
            next_step="save it with a current LyCORIS, in a rank that is not the number of inputs" if new else "",
        )
    first, second, left, right = ("a1", "a2", "b1", "b2") if new else ("a2", "a1", "b2", "b1")
    rest, scaling = trained.shape(right)[1:], trained.scaling(trained.shape(second)[0])

    def load(_: Shape) -> InputMix:
        a, b, c, d = (trained.matrix(part) for part in (first, second, left, right))
        return InputMix(a, b, c, d, trained.factor(scaling))

    parts = (second, first, left, right, "alpha", "scalar")
    return [Whole("glora", parts, trained.shape(left)[0], rest, load, copies=COPIES)]


def _fits(trained: Trained, first: str, second: str, left: str, right: str) -> bool:
    """Whether the parts are GLoRA of the base's weight in this order. A linear layer's file may be for a kernel of
    one point, and the other way round."""
    stored, outputs = trained.stored("weight"), trained.height("weight")
    shapes = [trained.shape(part) for part in (first, second, left, right)]
    if len(stored) < 2 or any(len(shape) < 2 for shape in shapes):
        return False
    a, b, c, d = shapes
    inputs, rank, rank_b = stored[1], b[0], d[0]
    points = all(n == 1 for shape in (a, b, c) for n in shape[2:])
    return (
        points
        and (a[:2], b[:2]) == ((inputs, rank), (rank, inputs))
        and (c[:2], d[:2]) == ((outputs, rank_b), (rank_b, inputs))
        and 0 not in (rank, rank_b)
    )
