"""Four-bit floating point numbers (E2M1), two in a byte, the first in the low bits, with a scale for each group.

A number has a sign, two bits of exponent and one of mantissa: 0, ½, 1, 1½, 2, 3, 4, 6 (OCP Microscaling Formats
1.0, E2M1). MXFP4 has an E8M0 scale for 32 of them, NVFP4 an E4M3 one for 16 and one in fp32 for the tensor, which
compressed-tensors stores as what the scales were multiplied with (they are divided by it), modelopt as what they
are multiplied with.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lora_export.contracts import TensorSource
from lora_export.quantization.scaled import POWERS, multiply, scale_values
from lora_export.quantization.stored import E2M1, QuantizedWeight, odd, part

if TYPE_CHECKING:
    import torch

BYTES = ("U8", "I8")
GROUPS = {"F8_E4M3": 16} | dict.fromkeys(POWERS, 32)  # elements of a group by the type of its scale


@cache
def _pairs() -> "torch.Tensor":
    """The two numbers of each byte, fp32, as one element of eight bytes."""
    import torch

    values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    both = torch.stack([values.repeat(16), values.repeat_interleave(16)], 1)
    return both.contiguous().view(torch.float64).reshape(256)


def unpack_fp4(packed: "torch.Tensor") -> "torch.Tensor":
    """Bytes (…, n) → fp32 (…, 2n)."""
    import torch

    indices = packed.contiguous().view(torch.uint8).reshape(-1).int()
    numbers = torch.index_select(_pairs(), 0, indices).view(torch.float32)
    return numbers.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


@dataclass(frozen=True)
class Fp4Rows:
    """codes: the name of the packed tensor; scale: fp32 (…, groups)."""

    source: TensorSource
    codes: str
    scale: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows of a matrix, or experts, [start, stop) in fp32."""
        value = unpack_fp4(self.source.read_rows(self.codes, start, stop))
        return multiply(value, self.scale[start:stop], value.shape[-1] // self.scale.shape[-1])


@dataclass(frozen=True)
class Fp4Weight(QuantizedWeight):
    """parts: packed numbers, scales, and maybe the scale of the tensor; divided: its scales are divided by it."""

    divided: bool = False

    @property
    def kept(self) -> tuple[str, ...]:
        return self.parts[1:]

    def load(self, source: TensorSource) -> Fp4Rows:
        scale = scale_values(source.read(self.parts[1]))
        if len(self.parts) > 2:
            whole = source.read(self.parts[2]).float()
            whole = whole.reshape(-1, *(1,) * (scale.dim() - 1))  # one, or one for each expert
            scale = scale / whole if self.divided else scale * whole
        return Fp4Rows(source, self.parts[0], scale)


def fp4_weight(
    source: TensorSource, weight: str, parts: tuple[str, ...], dtype: str, divided: bool = False
) -> Fp4Weight:
    """A weight of these parts, checked by headers. CheckpointError where they do not fit each other."""
    packed = part(source, weight, parts[0], BYTES, None)
    scale = part(source, weight, parts[1], tuple(GROUPS), None)
    group = GROUPS[scale.dtype]
    shape = (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.shape else ()
    if len(shape) not in (2, 3) or 0 in shape or scale.shape != (*shape[:-1], math.ceil(shape[-1] / group)):
        text = f"scales of shape {list(scale.shape)} for {list(packed.shape)} bytes"
        raise odd(scale, text, f"one for each {group} elements of a row, two of which are in a byte")
    if shape[-1] % group:
        raise odd(packed, f"{shape[-1]} elements in a row", f"a multiple of {group}")
    for name in parts[2:]:
        whole = part(source, weight, name, ("F32", "BF16", "F16"), None)
        if math.prod(whole.shape) not in (1, math.prod(shape[:-2])):
            raise odd(whole, f"{math.prod(whole.shape)} values", "one for the tensor, or for each expert")
    return Fp4Weight(weight, parts, shape, dtype, divided)
