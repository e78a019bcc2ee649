"""Small integers packed into int32 words, lowest bits first, as GPTQ, AWQ and compressed-tensors store them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def unpack(words: "torch.Tensor", bits: int, order: Sequence[int] | None = None) -> "torch.Tensor":
    """int32 (…, n) → int32 (…, n · 32/bits), unsigned; order[p] is the place of the p-th value of a word.

    Where bits does not divide 32, values run on from word to word: 32 of them lie in `bits` words.
    """
    import torch

    if 32 % bits:
        return _unpack_stream(words, bits)
    count = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    if order is not None:
        values = values[..., torch.argsort(torch.tensor(order))]
    return values.reshape(*words.shape[:-1], words.shape[-1] * count)


def _unpack_stream(words: "torch.Tensor", bits: int) -> "torch.Tensor":
    import torch

    at = torch.arange(32) * bits
    runs = words.reshape(*words.shape[:-1], words.shape[-1] // bits, bits).long() & 0xFFFFFFFF
    following = torch.cat(
        (runs[..., 1:], torch.zeros_like(runs[..., :1])), -1
    )  # the next word, into which a value may run on
    both = runs | (following << 32)  # the sign is shifted in from above, and masked away below
    values = (both[..., at // 32] >> (at % 32)) & ((1 << bits) - 1)
    return values.to(torch.int32).reshape(*words.shape[:-1], words.shape[-1] // bits * 32)


def strided(packed: "torch.Tensor", bits: int, rows: "torch.Tensor", count: int, low_first: bool) -> "torch.Tensor":
    """int32 codes (n, columns) of `rows` of a matrix whose row r lies in word r mod height, at place r // height.

    packed: (height, columns) integers that hold `count` rows each; low_first: place 0 has the lowest bits.
    """
    import torch

    place = rows // len(packed)
    shift = bits * (place if low_first else count - 1 - place)
    words = packed[rows % len(packed)].to(torch.int32)
    return (words >> shift[:, None].to(torch.int32)) & ((1 << bits) - 1)
