"""HRA (arXiv:2405.17484, eq. 3): W' = W·H₁·H₂·…, Householder reflections H = I − 2·u·uᵀ of the inputs."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import whole
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "HRA"
PEFT_TYPES = ("HRA",)
FORMULA = "W·Π(I − 2·uᵢ·uᵢᵀ), the uᵢ of length 1; with apply_GS they are made orthogonal first"

_MARKER = "hra_u"
_DEPENDENT = 1e-6  # of a vector's length: what is left of it is rounding, and its direction chance


@dataclass(frozen=True)
class ReflectionsUpdate:
    """W − (W·left)·right, the product of all reflections; left: fp32 (inputs, r), right: fp32 (r, inputs)."""

    left: "torch.Tensor"
    right: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        matrix = weight.flatten(1)
        return (matrix - (matrix @ self.left) @ self.right).reshape(weight.shape)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """terms + terms·|left|·|right|."""
        matrix = terms.flatten(1)
        return (matrix + (matrix @ self.left.abs()) @ self.right.abs()).reshape(terms.shape)


def reflections(vectors: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """P (n, r) and Uᵀ (r, n) with I − P·Uᵀ = H₁·H₂·…·Hᵣ for the columns of `vectors` (n, r), float64.

    H₁·…·Hₖ = H₁·…·Hₖ₋₁ − 2·(H₁·…·Hₖ₋₁·uₖ)·uₖᵀ, so column k of P is 2·(uₖ − P·Uᵀ·uₖ) with what is there before.
    """
    import torch

    unit = vectors / vectors.norm(dim=0)
    left = torch.zeros_like(unit)
    for k in range(unit.shape[1]):
        u = unit[:, k]
        left[:, k] = 2 * (u - left[:, :k] @ (unit[:, :k].T @ u))
    return left, unit.T


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or a convolution with a square kernel and without groups."""
    modules = group(file.tensors, (_MARKER,))
    if not modules:
        return []
    file.refuse_weight(NAME)
    rank, orthogonal = whole(file.config, "r", file.where), file.config.get("apply_GS")
    if not isinstance(orthogonal, bool):
        raise file.refuse(f"apply_GS is {orthogonal!r}", expected="true or false, as PEFT writes it")
    return [_update(file, name, keys[_MARKER], rank, orthogonal) for name, keys in modules.items()]


def _update(file: AdapterFile, name: str, key: str, rank: int, orthogonal: bool) -> TargetUpdate:
    inputs, count = file.shape(key, 2)
    if count != rank:
        raise file.refuse(f"the shape is {[inputs, count]}, r is {rank}", tensor=key, expected="(inputs, r)")

    def load(_: tuple[int, ...]) -> ReflectionsUpdate:
        stored = file.read(key)
        vectors = stored.double()
        _check_lengths(file, key, vectors)
        left, right = reflections(_gram_schmidt(file, key, vectors) if orthogonal else vectors)
        return ReflectionsUpdate(left.to(stored.dtype), right.to(stored.dtype))

    kernels = [k for k in range(1, math.isqrt(inputs) + 1) if inputs % k**2 == 0]
    shapes = ((None, inputs), *((None, inputs // k**2, k, k) for k in kernels))
    return TargetUpdate(f"{name}.weight", "hra", (key,), shapes, load)


def _check_lengths(file: AdapterFile, key: str, vectors: "torch.Tensor") -> None:
    if not bool((vectors.norm(dim=0) > 0).all()):
        raise file.refuse("a vector is zero, and reflects nothing", tensor=key, expected="vectors that are not 0")


def _gram_schmidt(file: AdapterFile, key: str, vectors: "torch.Tensor") -> "torch.Tensor":
    """Orthonormal columns, one after the other (the modified form, as PEFT does it)."""
    import torch

    found: list[torch.Tensor] = []
    for column in vectors.T:
        rest = column
        for before in found:
            rest = rest - (before @ rest) * before
        if rest.norm() <= _DEPENDENT * column.norm():
            raise file.refuse(
                f"vector {len(found)} is a combination of those before it, and apply_GS divides by what is left",
                tensor=key,
                expected="vectors that are linearly independent; PEFT's initialization makes them equal in pairs",
                next_step="train with init_weights=false, or with apply_GS=false",
            )
        found.append(rest / rest.norm())
    return torch.stack(found, dim=1)
