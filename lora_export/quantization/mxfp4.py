"""gpt-oss's experts in MXFP4: X_blocks U8 (experts, out, groups, 16), X_scales U8 (experts, out, groups).

A byte has two E2M1 numbers (fp4.py), the first in its low bits; a scale is 2^(b − 127) for 32 numbers of a row. The
loaded model has the weight turned, (experts, in, out), as transformers.integrations.mxfp4 makes it. Every number is
exact in bfloat16, but for the outermost exponents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.quantization.scaled import scale_values
from lora_export.quantization.stored import QuantizedWeight, expect, odd, part

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as …experts.gate_up_proj_blocks"
BLOCKS, SCALES = "_blocks", "_scales"
_BYTES = 16  # of a group
_WORDS = 8  # of 16 bits, with four numbers each
_TOGETHER = 2**21  # numbers that are unpacked at a time: more calls cost more than what leaves the cache
# E2M1 in the place of a float16's sign, exponent and mantissa is 2⁻¹⁴ of itself, ½ included (as a subnormal).
_SMALL = 2.0**14
_PLACES = -0x71FF71FF71FF7200  # 0x8E00, bits 9 to 11 and 15, in each of four words of 16


@dataclass(frozen=True)
class BlockRows:
    source: TensorSource
    blocks: str
    scales: str

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Experts [start, stop), fp32 (stop − start, in, out)."""
        import torch

        return self._read(start, stop, scale_values(self.source.read_rows(self.scales, start, stop)), torch.float32)

    def rows_in(self, start: int, stop: int, dtype: "torch.dtype") -> "torch.Tensor | None":
        """The same in bfloat16, rounded once; None for another type, or if a number may be too large for it.

        A merge that only dequantizes writes just these, and is spared the fp32 numbers between.
        """
        import torch

        if dtype != torch.bfloat16:
            return None
        scales = scale_values(self.source.read_rows(self.scales, start, stop))
        return self._read(start, stop, scales, dtype) if bool((scales < 2.0**113).all()) else None

    def _read(self, start: int, stop: int, scales: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
        import torch

        blocks = self.source.read_rows(self.blocks, start, stop)
        count, out, groups, _ = blocks.shape
        result = torch.empty(count, groups, _WORDS, 4, out, dtype=dtype)
        step = max(1, _TOGETHER // (2 * _BYTES * out))
        for expert in range(count):
            scale = scales[expert].T.contiguous()
            for at in range(0, groups, step):
                some = slice(at, min(at + step, groups))
                words = blocks[expert, :, some].reshape(out, -1).view(torch.int16).T.contiguous()
                _unpack(words, scale[some, None], result[expert, some])
        return result.view(count, groups * 2 * _BYTES, out)


def _unpack(words: "torch.Tensor", scale: "torch.Tensor", into: "torch.Tensor") -> None:
    """words: int16 (groups · 8, out); scale: fp32 (groups, 1, out); into: (groups, 8, 4, out), any float type.

    The four bits of a number go to the top of a word, and three places down with their sign: then it has its place,
    and magnitude its own. They go up in four words at a time; what leaves a word for the next is masked away.
    """
    import torch

    packed = words.view(-1).view(torch.int64)
    spread, moved = scale * _SMALL, torch.empty_like(packed)
    safe = bool((scale < 2.0**113).all())  # else the factor itself would be infinite
    numbers = torch.empty(scale.shape[0], _WORDS, words.shape[1])
    halves, each = moved.view(torch.float16).view(numbers.shape), moved.view(torch.int16)
    for j in range(4):
        torch.bitwise_left_shift(packed, 12 - 4 * j, out=moved)
        each.bitwise_right_shift_(3)
        moved.bitwise_and_(_PLACES)
        torch.mul(halves, spread if safe else _SMALL, out=numbers)
        into[:, :, j].copy_(numbers if safe else numbers.mul_(scale))


@dataclass(frozen=True)
class BlockWeight(QuantizedWeight):
    @property
    def kept(self) -> tuple[str, ...]:
        return ()

    def load(self, source: TensorSource) -> BlockRows:
        return BlockRows(source, *self.parts)


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[BlockWeight]:
    weights = []
    for name in source.tensors:
        weight = name.removesuffix(BLOCKS)
        if weight == name or f"{weight}{SCALES}" not in source.tensors:
            continue
        blocks = part(source, weight, name, ("U8",), 4)
        experts, out, groups, width = blocks.shape
        if width != _BYTES or 0 in blocks.shape:
            raise odd(blocks, f"the shape is {list(blocks.shape)}", f"[experts, out, groups, {_BYTES}]")
        scales = part(source, weight, f"{weight}{SCALES}", ("U8", "F8_E8M0"), 3)
        expect(scales, (experts, out, groups))
        weights.append(BlockWeight(weight, (name, scales.name), (experts, groups * 2 * _BYTES, out), dtype))
    return weights
