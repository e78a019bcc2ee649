"""gpt-oss's experts in MXFP4: X_blocks U8 (experts, out, groups, 16), X_scales U8 (experts, out, groups).

A byte has two E2M1 numbers (fp4.py), the first in its low bits; a scale is 2^(b − 127) for 32 numbers of a row. The
loaded model has the weight turned, (experts, in, out), as transformers.integrations.mxfp4 makes it. Every number is
exact in bfloat16, but for the outermost exponents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.packed import expect, part
from lora_export.quantization.scaled import scale_values

if TYPE_CHECKING:
    import torch

BLOCKS, SCALES = "_blocks", "_scales"
_BYTES = 16  # of a group
_TOGETHER = 2**18  # numbers that are unpacked at a time, so that they stay in the processor's cache
# E2M1 in the place of a float16's sign, exponent and mantissa is 2⁻¹⁴ of itself, ½ included (as a subnormal).
_SMALL = 2.0**14


@dataclass(frozen=True)
class BlockRows:
    source: TensorSource
    blocks: str
    scales: str

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Experts [start, stop), fp32 (stop − start, in, out)."""
        import torch

        blocks = self.source.read_rows(self.blocks, start, stop)
        scales = scale_values(self.source.read_rows(self.scales, start, stop))
        count, out, groups, _ = blocks.shape
        result = torch.empty(count, groups, _BYTES, 2, out)
        step = max(1, _TOGETHER // (2 * _BYTES * out))
        for expert in range(count):
            scale = scales[expert].T.contiguous()
            for at in range(0, groups, step):
                some = slice(at, min(at + step, groups))
                packed = blocks[expert, :, some].reshape(out, -1).T.contiguous()
                _unpack(packed.view(-1, _BYTES, out), scale[some], result[expert, some])
        return result.view(count, groups * 2 * _BYTES, out)


def _unpack(packed: "torch.Tensor", scale: "torch.Tensor", into: "torch.Tensor") -> None:
    """packed: uint8 (groups, 16, out); scale: fp32 (groups, out); into: fp32 (groups, 16, 2, out)."""
    import torch

    words = packed.to(torch.int16)
    spread = (scale * _SMALL)[:, None]
    safe = bool((scale < 2.0**113).all())
    for half, (magnitude, sign) in enumerate(((9, 12), (5, 8))):
        bits = ((words << magnitude) & 0x0E00) | ((words << sign) & -0x8000)
        numbers = bits.view(torch.float16).float()
        if safe:
            torch.mul(numbers, spread, out=into[:, :, half])
        else:  # the factor itself would be infinite
            into[:, :, half] = numbers * _SMALL * scale[:, None]


@dataclass(frozen=True)
class BlockWeight:
    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def kept(self) -> tuple[str, ...]:
        """No part stays in memory while rows are read."""
        return ()

    def load(self, source: TensorSource) -> BlockRows:
        return BlockRows(source, *self.parts)


def find(source: TensorSource, settings: Mapping[str, Any], dtype: str) -> list[BlockWeight]:
    """Every weight in blocks, checked by headers; dtype: what the model computes in."""
    found = []
    for name in source.tensors:
        if name.endswith(BLOCKS) and f"{name.removesuffix(BLOCKS)}{SCALES}" in source.tensors:
            weight = name.removesuffix(BLOCKS)
            blocks = part(source, weight, name, ("U8",), 4)
            experts, out, groups, width = blocks.shape
            if width != _BYTES or 0 in blocks.shape:
                raise CheckpointError(
                    f"the shape is {list(blocks.shape)}",
                    where=blocks.file,
                    tensor=name,
                    expected=f"[experts, out, groups, {_BYTES}]",
                )
            scales = part(source, weight, f"{weight}{SCALES}", ("U8", "F8_E8M0"), 3)
            expect(scales, (experts, out, groups))
            found.append(BlockWeight(weight, (name, scales.name), (experts, groups * 2 * _BYTES, out), dtype))
    return found
