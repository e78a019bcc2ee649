"""BOFT (arXiv:2311.06243, eq. 4-6): W' = diag(s)·W·Mᵀ, M a product of rotations in permuted blocks."""

import math
from dataclasses import dataclass

import torch

from lora_export.adapters.config import Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.oft import cayley, rotate
from lora_export.contracts import TargetUpdate

NAME = "BOFT"
FORMULA = "diag(s)·W·(B₁…B₀)ᵀ with butterfly factors Bᵢ = Pᵢ·diag(Cayley transforms)·Pᵢᵀ"

_PARTS = ("boft_R", "boft_s")


@dataclass(frozen=True)
class ButterflyUpdate:
    """Rows are rotated each for itself, then scaled.

    blocks: fp32 (factors, blocks, n, n), the factor nearest to the weight first; scales: fp32 (out,).
    """

    blocks: torch.Tensor
    scales: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        matrix = weight.flatten(1)
        for factor, blocks in enumerate(self.blocks):
            order = butterfly_order(matrix.shape[1], blocks.shape[-1], factor).to(weight.device)
            matrix = rotate(matrix[:, torch.argsort(order)], blocks)[:, order]
        return (self.scales[rows, None] * matrix).reshape(weight.shape)


def butterfly_order(width: int, size: int, factor: int) -> torch.Tensor:
    """Row i of the permutation matrix P has its one in column order[i]; `size` is that of a rotated block.

    A group of size·2^factor inputs is taken in halves of blocks: first the even halves, then the odd ones.
    Factor 0 is the identity, as then the halves already stand together.
    """
    if factor == 0:
        return torch.arange(width)
    halves = torch.arange(width).reshape(-1, 2**factor, 2, size // 2)
    return halves.transpose(1, 2).reshape(width)


@dataclass(frozen=True)
class Settings:
    boft_n_butterfly_factor: Positive


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or a convolution without groups and dilation (PEFT ignores dilation)."""
    file.refuse_weight(NAME)
    factors = file.settings(Settings).boft_n_butterfly_factor
    return [_update(module, factors) for module in complete(file, *_PARTS)]


def _update(module: AdaptedModule, configured: int) -> TargetUpdate:
    rotations, scales = (module.shape(p) for p in _PARTS)
    if len(rotations) != 4 or rotations[2] != rotations[3] or 0 in rotations:
        raise module.disagree("(butterfly factors, blocks, n, n)", "boft_R")
    if len(scales) != 2 or 1 not in scales:
        raise module.disagree("(out, 1) for a linear layer, (1, out) for a convolution", "boft_s")
    _check_factors(module, configured)

    def load(_: tuple[int, ...]) -> ButterflyUpdate:
        raw, scales = module.read("boft_R").double(), module.read("boft_s").reshape(-1)
        blocks = torch.stack([cayley((factor - factor.mT) / 2) for factor in raw])
        return ButterflyUpdate(blocks.to(scales.dtype), scales)

    return TargetUpdate(module.weight, "boft", module.used, _shapes(rotations[1] * rotations[2], scales), load)


def _check_factors(module: AdaptedModule, configured: int) -> None:
    factors, blocks, size, _ = module.shape("boft_R")
    # Where its CUDA extension does not build, PEFT trains and saves one factor, whatever the configuration says.
    if factors not in (1, configured):
        raise module.file.refuse(
            f"{factors} butterfly factors, boft_n_butterfly_factor is {configured}",
            tensor=module.keys["boft_R"],
            expected="one factor, or as many as are configured",
        )
    if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
        raise module.file.refuse(
            f"{blocks} blocks of {size}×{size} cannot be interleaved {factors - 1} times",
            tensor=module.keys["boft_R"],
            expected=f"blocks of an even size, their number a multiple of 2^{factors - 1}",
        )


def _shapes(inputs: int, scales: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Weights with that many inputs: a matrix, or square kernels with inputs = channels·height·width."""
    out = max(scales)
    linear = ((out, inputs),) if scales == (out, 1) else ()
    kernels = [k for k in range(1, math.isqrt(inputs) + 1) if inputs % k**2 == 0] if scales == (1, out) else []
    return (*linear, *((out, inputs // k**2, k, k) for k in kernels))
