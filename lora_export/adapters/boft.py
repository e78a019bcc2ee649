"""BOFT (arXiv:2311.06243, eq. 4-6): W' = diag(s)·W·Mᵀ, M a product of rotations in permuted blocks."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import whole
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.oft import cayley, rotate
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "BOFT"
PEFT_TYPES = ("BOFT",)
FORMULA = "diag(s)·W·(B₁…B₀)ᵀ with butterfly factors Bᵢ = Pᵢ·diag(Cayley transforms)·Pᵢᵀ"

_PARTS = ("boft_R", "boft_s")


@dataclass(frozen=True)
class ButterflyUpdate:
    """Rows are rotated each for itself, then scaled.

    blocks: fp32 (factors, blocks, n, n), the factor nearest to the weight first; scales: fp32 (out,).
    """

    blocks: "torch.Tensor"
    scales: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        matrix = weight.flatten(1)
        for factor, blocks in enumerate(self.blocks):
            order = butterfly_order(matrix.shape[1], blocks.shape[-1], factor).to(weight.device)
            matrix = rotate(matrix[:, torch.argsort(order)], blocks)[:, order]
        return (self.scales[rows, None] * matrix).reshape(weight.shape)


def butterfly_order(width: int, size: int, factor: int) -> "torch.Tensor":
    """Row i of the permutation matrix P has its one in column order[i]; `size` is that of a rotated block.

    A group of size·2^factor inputs is taken in halves of blocks: first the even halves, then the odd ones.
    Factor 0 is the identity, as then the halves already stand together.
    """
    import torch

    if factor == 0:
        return torch.arange(width)
    halves = torch.arange(width).reshape(-1, 2**factor, 2, size // 2)
    return halves.transpose(1, 2).reshape(width)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or a convolution without groups and dilation (PEFT ignores dilation)."""
    modules = group(file.tensors, _PARTS)
    if not modules:
        return []
    file.refuse_weight(NAME)
    factors = whole(file.config, "boft_n_butterfly_factor", file.where)
    return [_update(file, name, keys, factors) for name, keys in modules.items()]


def _update(file: AdapterFile, name: str, keys: dict[str, str], configured: int) -> TargetUpdate:
    missing = [p for p in _PARTS if p not in keys]
    if missing:
        raise file.refuse(
            f"{missing[0]} of this module is missing",
            tensor=name,
            expected="boft_R and boft_s",
            next_step="save the adapter again: model.save_pretrained(DIR)",
        )
    r_key, s_key = (keys[p] for p in _PARTS)
    rotations, scales = file.tensors[r_key].shape, file.tensors[s_key].shape
    if len(rotations) != 4 or rotations[2] != rotations[3] or 0 in rotations:
        raise file.refuse(
            f"the shape is {list(rotations)}", tensor=r_key, expected="(butterfly factors, blocks, n, n)"
        )
    if len(scales) != 2 or 1 not in scales:
        raise file.refuse(
            f"the shape is {list(scales)}",
            tensor=s_key,
            expected="(out, 1) for a linear layer, (1, out) for a convolution",
        )
    _check_factors(file, r_key, configured)

    def load(_: tuple[int, ...]) -> ButterflyUpdate:
        import torch

        raw, scales = file.read(r_key).double(), file.read(s_key).reshape(-1)
        blocks = torch.stack([cayley((factor - factor.mT) / 2) for factor in raw])
        return ButterflyUpdate(blocks.to(scales.dtype), scales)

    shapes = _shapes(rotations[1] * rotations[2], scales)
    return TargetUpdate(f"{name}.weight", "boft", (r_key, s_key), shapes, load)


def _check_factors(file: AdapterFile, key: str, configured: int) -> None:
    factors, blocks, size, _ = file.tensors[key].shape
    # Where its CUDA extension does not build, PEFT trains and saves one factor, whatever the configuration says.
    if factors not in (1, configured):
        raise file.refuse(
            f"{factors} butterfly factors, boft_n_butterfly_factor is {configured}",
            tensor=key,
            expected="one factor, or as many as are configured",
        )
    if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
        raise file.refuse(
            f"{blocks} blocks of {size}×{size} cannot be interleaved {factors - 1} times",
            tensor=key,
            expected=f"blocks of an even size, their number a multiple of 2^{factors - 1}",
        )


def _shapes(inputs: int, scales: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Weights with that many inputs: a matrix, or square kernels with inputs = channels·height·width."""
    out = max(scales)
    linear = ((out, inputs),) if scales == (out, 1) else ()
    kernels = [k for k in range(1, math.isqrt(inputs) + 1) if inputs % k**2 == 0] if scales == (1, out) else []
    return (*linear, *((out, inputs // k**2, k, k) for k in kernels))
