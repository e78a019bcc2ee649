"""HQQ weights as the library hqq stores them (hqq/core/quantize.py, bitpack.py): W = (q − zero) · scale.

The weight (out, in) is written as one row of numbers and cut into groups: with axis 1 a group is a row of a matrix
(out · in / size, size), with axis 0 a column of (size, out · in / size). X.W_q holds that matrix, rows far apart
sharing a word, the first in the highest bits; X.scale and X.zero have a value for each group. X.shape, X.nbits,
X.group_size, X.axis, X.packing (a text, a byte a letter) and others are numbers that the library needs to load it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.quantization.packed import strided
from lora_export.quantization.stored import FLOATS, QuantizedWeight, expect, odd, part

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as …q_proj.W_q"
# The name of a packing → (bits of a value, values of a word).
PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
BESIDE = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
INTEGERS = ("U8", "I8", "I32", "I64")
LONGEST = 64  # bytes of a packing's name


@dataclass(frozen=True)
class HqqRows:
    """packed: (words, columns); scale, zero: fp32, (height, 1) or (1, width) of the matrix of groups."""

    packed: "torch.Tensor"
    packing: str
    scale: "torch.Tensor"
    zero: "torch.Tensor"
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the weight, fp32."""
        import torch

        bits, count = PACKINGS[self.packing]
        width, across = self.packed.shape[1], self.shape[1]
        first, last = start * across // width, -(-stop * across // width)
        codes = strided(self.packed, bits, torch.arange(first, last), count, low_first=False).float()
        scale, zero = (t if t.shape[0] == 1 else t[first:last] for t in (self.scale, self.zero))
        flat = ((codes - zero) * scale).reshape(-1)
        begin = start * across - first * width
        return flat[begin : begin + (stop - start) * across].reshape(stop - start, across)


@dataclass(frozen=True)
class HqqWeight(QuantizedWeight):
    packing: str

    def load(self, source: TensorSource) -> HqqRows:
        import torch

        codes, scale, zero = (source.read(name) for name in self.parts[:3])
        if codes.is_floating_point():  # view_as_float: the bytes of the words, called floats
            codes = codes.view(torch.int32 if self.packing == "3bit_32" else torch.uint8)
        return HqqRows(codes, self.packing, scale.float(), zero.float(), self.shape)


def is_here(source: TensorSource) -> bool:
    """Whether the names of the tensors are HQQ's."""
    return any(n.endswith(".W_q") for n in source.tensors)


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[HqqWeight]:
    return [_weight(source, n.removesuffix(".W_q"), dtype) for n in source.tensors if n.endswith(".W_q")]


def _weight(source: TensorSource, module: str, dtype: str) -> HqqWeight:
    weight = f"{module}.weight"
    packed = part(source, weight, f"{module}.W_q", ("U8", "I32", *FLOATS))
    scale, zero = (part(source, weight, f"{module}.{n}", FLOATS) for n in ("scale", "zero"))
    size = part(source, weight, f"{module}.shape", INTEGERS, 1)
    expect(size, (2,))
    rows, columns = (int(n) for n in source.read(size.name).tolist())
    axis = part(source, weight, f"{module}.axis", INTEGERS, 0)
    along = int(source.read(axis.name))
    name = part(source, weight, f"{module}.packing", ("U8",), 1)
    packing = bytes(source.read(name.name).tolist()).decode("ascii", "replace") if name.nbytes <= LONGEST else ""
    if packing not in PACKINGS or along not in (0, 1):
        raise odd(name, f"HQQ packed as {packing!r} along axis {along}", f"{', '.join(PACKINGS)}; axis 0 or 1")
    groups = math.prod(scale.shape)
    expect(scale, (groups, 1) if along == 1 else (1, groups))
    expect(zero, scale.shape)
    _check_words(packed, packing, (rows, columns), groups, along)
    beside = [f"{module}.{n}" for n in BESIDE if f"{module}.{n}" in source.tensors]
    return HqqWeight(weight, (packed.name, scale.name, zero.name, *beside), (rows, columns), dtype, packing)


def _check_words(packed: TensorInfo, packing: str, shape: tuple[int, int], groups: int, axis: int) -> None:
    numbers = shape[0] * shape[1]
    if min(shape) < 1 or not groups or numbers % groups:
        raise odd(packed, f"{groups} groups for a weight of {shape[0]} × {shape[1]}")
    height, width = (groups, numbers // groups) if axis == 1 else (numbers // groups, groups)
    words, item = math.ceil(height / PACKINGS[packing][1]), 4 if packing == "3bit_32" else 1
    if packed.dtype in FLOATS and packed.shape[0] == words and packed.nbytes == words * width * item:
        return
    expect(packed, (words, width))
    if packed.nbytes != words * width * item:
        raise odd(packed, f"the type is {packed.dtype}")
