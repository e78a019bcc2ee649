"""Layers in small floating point formats as files hold them, and their weights in float64, number by number."""

import math
from typing import Any

import torch

from tests.quantization.packing import Tensors, integers, scales


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Four bits → float64: a sign, two bits of exponent (bias 1), one of mantissa; ½ m without exponent."""
    codes = codes.long()
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    magnitude = torch.where(exponent == 0, mantissa * 0.5, (1 + mantissa * 0.5) * 2.0 ** (exponent - 1).double())
    return torch.where(codes >= 8, -magnitude, magnitude).double()


def e8m0(codes: torch.Tensor) -> torch.Tensor:
    return torch.pow(torch.tensor(2.0, dtype=torch.float64), codes.double() - 127)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes (…, n) → four bits each, (…, 2n), the low ones first."""
    low, high = packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4
    return torch.stack([low, high], -1).reshape(*packed.shape[:-1], -1)


def spread(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A grid (…, rows, columns) of even blocks over matrices of this shape, float64."""
    height, width = (math.ceil(n / g) for n, g in zip(shape[-2:], scale.shape[-2:], strict=True))
    wide = scale.double().repeat_interleave(height, -2)[..., : shape[-2], :]
    return wide.repeat_interleave(width, -1)[..., : shape[-1]]


def blocks(experts: int, out: int, width: int, low: int = 118, high: int = 126) -> tuple[Tensors, torch.Tensor]:
    """gpt-oss's MXFP4: names end in _blocks and _scales, the weight is (experts, in, out)."""
    packed = integers(0, 256, experts, out, width // 32, 16).to(torch.uint8)
    scale = integers(low, high, experts, out, width // 32, seed=2).to(torch.uint8)
    exact = e2m1(nibbles(packed)) * e8m0(scale)[..., None]
    return {"blocks": packed, "scales": scale}, exact.reshape(experts, out, width).transpose(1, 2)


def fp4(
    *shape: int, group: int = 16, whole: float | None = None, kind: torch.dtype = torch.uint8
) -> tuple[Tensors, torch.Tensor]:
    """packed and scale, of E4M3 for groups of 16 and E8M0 bytes for 32; whole: what all are multiplied with."""
    packed = integers(0, 256, *shape[:-1], shape[-1] // 2).to(torch.uint8).view(kind)
    grid = (*shape[:-1], shape[-1] // group)
    scale = integers(120, 128, *grid, seed=3).to(torch.uint8)
    factor = e8m0(scale)
    if group == 16:
        scale = (torch.rand(grid, generator=torch.Generator().manual_seed(8)) * 400 + 1).to(torch.float8_e4m3fn)
        factor = scale.double()
    exact = e2m1(nibbles(packed)) * factor.repeat_interleave(group, -1) * (1.0 if whole is None else whole)
    return {"packed": packed, "scale": scale}, exact


def fp8(
    shape: tuple[int, ...], grid: tuple[int, ...], numbers: torch.dtype = torch.float8_e4m3fn, power: bool = False
) -> tuple[Tensors, torch.Tensor]:
    """codes and scale; power: bytes of exponents."""
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(numbers)
    scale: Any = scales(*grid, dtype=torch.float32)
    factor = scale
    if power:
        scale = integers(110, 128, *grid, seed=5).to(torch.uint8)
        factor = e8m0(scale)
    return {"codes": codes, "scale": scale}, codes.double() * spread(factor, shape)
