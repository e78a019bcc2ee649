"""Quantized layers as files hold them, packed by the formats' descriptions, and their weights in float64."""

import math

import torch

Tensors = dict[str, torch.Tensor]


def integers(low: int, high: int, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 0.02 + 0.01).to(dtype)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(…, n) small unsigned integers → int32 words, the first value in the lowest bits; one bit at a time.

    Values run on from word to word.
    """
    words = torch.zeros(*values.shape[:-1], math.ceil(values.shape[-1] * bits / 32), dtype=torch.int64)
    for i in range(values.shape[-1] * bits):
        words[..., i // 32] |= (values[..., i // bits].long() >> i % bits & 1) << i % 32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq(
    out: int, width: int, bits: int = 4, group: int = 32, act_order: bool = False, v2: bool = False, name: str = "w"
) -> tuple[Tensors, torch.Tensor]:
    """What a GPTQ file holds for one layer, and its weight in float64."""
    size = width if group == -1 else group
    count = math.ceil(width / size)
    codes, zeros, scale = (
        integers(0, 2**bits, width, out),
        integers(0, 2**bits, count, out, seed=2),
        scales(count, out),
    )
    owner = torch.arange(width) // size
    if act_order:
        owner = owner[torch.randperm(width, generator=torch.Generator().manual_seed(3))]
    stored = zeros if v2 else (zeros - 1) % 2**bits
    exact = (codes - zeros[owner]).double() * scale[owner].double()
    parts = {"qweight": pack(codes.T, bits).T, "qzeros": pack(stored, bits), "scales": scale, "g_idx": owner.int()}
    return {f"{name}.{k}": v.contiguous() for k, v in parts.items()}, exact.T


def awq(out: int, width: int, group: int = 32, name: str = "w") -> tuple[Tensors, torch.Tensor]:
    size = width if group == -1 else group
    count = math.ceil(width / size)
    codes, zeros, scale = integers(0, 16, width, out), integers(0, 16, count, out, seed=2), scales(count, out)
    owner = torch.arange(width) // size
    exact = (codes - zeros[owner]).double() * scale[owner].double()
    order = [8 * block + place for block in range(out // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    parts = {"qweight": pack(codes[:, order], 4), "qzeros": pack(zeros[:, order], 4), "scales": scale}
    return {f"{name}.{k}": v for k, v in parts.items()}, exact.T


def fp8(out: int, width: int, block: tuple[int, int] | None = (16, 32)) -> tuple[Tensors, torch.Tensor]:
    codes = torch.randn(out, width, generator=torch.Generator().manual_seed(4)).to(torch.float8_e4m3fn)
    height, across = block or (out, width)
    scale = scales(math.ceil(out / height), math.ceil(width / across), dtype=torch.float32)
    exact = codes.double()
    for i in range(out):
        for j in range(width):
            exact[i, j] *= scale[i // height, j // across].double()
    return {"w.weight": codes, "w.weight_scale_inv": scale}, exact


def packed(
    out: int, width: int, bits: int = 4, group: int = 32, symmetric: bool = True, act_order: bool = False
) -> tuple[Tensors, torch.Tensor]:
    half, count = 2 ** (bits - 1), width // group
    codes, scale = integers(-half, half, out, width), scales(out, count, dtype=torch.bfloat16)
    zeros = torch.zeros(out, count, dtype=torch.long) if symmetric else integers(-half, half, out, count, seed=2)
    owner = torch.arange(width) // group
    parts = {"weight_packed": pack(codes + half, bits), "weight_scale": scale}
    parts["weight_shape"] = torch.tensor([out, width])
    if not symmetric:
        parts["weight_zero_point"] = pack((zeros + half).T, bits).T
    if act_order:
        owner = owner[torch.randperm(width, generator=torch.Generator().manual_seed(3))]
        parts["weight_g_idx"] = owner.int()
    exact = (codes - zeros[:, owner]).double() * scale[:, owner].double()
    return {f"w.{k}": v.contiguous() for k, v in parts.items()}, exact


def plain(
    out: int, width: int, codes: torch.Tensor, grid: tuple[int, ...], block: tuple[int, int], zero: bool = False
) -> tuple[Tensors, torch.Tensor]:
    scale = scales(*grid, dtype=torch.float32)
    spread = scale.reshape(math.ceil(out / block[0]), -1).double()
    rows, columns = torch.arange(out) // block[0], torch.arange(width) // block[1]
    parts, exact = {"w.weight": codes, "w.weight_scale": scale}, codes.double()
    if zero:
        parts["w.weight_zero_point"] = integers(-9, 9, *grid, seed=2).to(torch.int8)
        exact = exact - parts["w.weight_zero_point"].reshape(spread.shape).double()[rows][:, columns]
    return parts, exact * spread[rows][:, columns]
