"""HRA (arXiv:2405.17484, eq. 3): W' = W·H₁·H₂·…, Householder reflections H = I − 2·u·uᵀ of the inputs."""

import math
from dataclasses import dataclass

import torch

from lora_export.adapters.config import Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.contracts import TargetUpdate

NAME = "HRA"
FORMULA = "W·Π(I − 2·uᵢ·uᵢᵀ), the uᵢ of length 1; with apply_GS they are made orthogonal first"

_VECTORS = "hra_u"
_DEPENDENT = 1e-6  # of a vector's length: what is left of it is rounding, and its direction chance


@dataclass(frozen=True)
class ReflectionsUpdate:
    """W − (W·left)·right, the product of all reflections; left: fp32 (inputs, r), right: fp32 (r, inputs)."""

    left: torch.Tensor
    right: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        matrix = weight.flatten(1)
        return (matrix - (matrix @ self.left) @ self.right).reshape(weight.shape)

    def terms(self, weight: torch.Tensor, terms: torch.Tensor, rows: slice) -> torch.Tensor:
        """terms + terms·|left|·|right|."""
        matrix = terms.flatten(1)
        return (matrix + (matrix @ self.left.abs()) @ self.right.abs()).reshape(terms.shape)


def reflections(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P (n, r) and Uᵀ (r, n) with I − P·Uᵀ = H₁·H₂·…·Hᵣ for the columns of `vectors` (n, r), float64.

    H₁·…·Hₖ = H₁·…·Hₖ₋₁ − 2·(H₁·…·Hₖ₋₁·uₖ)·uₖᵀ, so column k of P is 2·(uₖ − P·Uᵀ·uₖ) with what is there before.
    """
    unit = vectors / vectors.norm(dim=0)
    left = torch.zeros_like(unit)
    for k in range(unit.shape[1]):
        u = unit[:, k]
        left[:, k] = 2 * (u - left[:, :k] @ (unit[:, :k].T @ u))
    return left, unit.T


@dataclass(frozen=True)
class Settings:
    """apply_GS: the vectors are made orthogonal first."""

    r: Positive
    apply_GS: bool


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or a convolution with a square kernel and without groups."""
    file.refuse_weight(NAME)
    settings = file.settings(Settings)
    return [_update(module, settings) for module in complete(file, _VECTORS)]


def _update(module: AdaptedModule, settings: Settings) -> TargetUpdate:
    inputs, count = module.file.shape(module.keys[_VECTORS], 2)
    if count != settings.r:
        raise module.disagree("(inputs, r)", also=f"r is {settings.r}")

    def load(_: tuple[int, ...]) -> ReflectionsUpdate:
        stored = module.read(_VECTORS)
        vectors = stored.double()
        if not bool((vectors.norm(dim=0) > 0).all()):
            raise module.file.refuse(
                "a vector is zero and defines no reflection",
                tensor=module.keys[_VECTORS],
                expected="vectors that are not 0",
            )
        left, right = reflections(_gram_schmidt(module, vectors) if settings.apply_GS else vectors)
        return ReflectionsUpdate(left.to(stored.dtype), right.to(stored.dtype))

    kernels = [k for k in range(1, math.isqrt(inputs) + 1) if inputs % k**2 == 0]
    shapes = ((None, inputs), *((None, inputs // k**2, k, k) for k in kernels))
    return TargetUpdate(module.weight, "hra", module.used, shapes, load)


def _gram_schmidt(module: AdaptedModule, vectors: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns, one after the other (the modified form, as PEFT does it)."""
    columns: list[torch.Tensor] = []
    for column in vectors.T:
        rest = column
        for before in columns:
            rest = rest - (before @ rest) * before
        if rest.norm() <= _DEPENDENT * column.norm():
            raise module.file.refuse(
                f"vector {len(columns)} is a combination of those before it, and apply_GS divides by what is left",
                tensor=module.keys[_VECTORS],
                expected="vectors that are linearly independent; PEFT's initialization makes them equal in pairs",
                next_step="train with init_weights=false, or with apply_GS=false",
            )
        columns.append(rest / rest.norm())
    return torch.stack(columns, dim=1)
