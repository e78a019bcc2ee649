"""AWQ weights (arXiv:2306.00978) of AutoAWQ's version "gemm": W[o, i] = (q[i, o] − zero[g, o]) · scale[g, o].

Layout: X.qweight int32 (in, out/8); X.qzeros int32 (groups, out/8); X.scales (groups, out). The eight 4-bit values
of a word are the outputs 0, 2, 4, 6, 1, 3, 5, 7 of its block, lowest bits first. With zero_point false (AutoRound)
X.qzeros is still there, with 8 in every place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.quantization.gptq import in_groups
from lora_export.quantization.packed import unpack
from lora_export.quantization.settings import decoded_settings
from lora_export.quantization.stored import FLOATS, ORIGINAL, QuantizedWeight, expect, groups_of, part, unread

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as …q_proj.qweight"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqSettings:
    """w_bit, q_group_size: AutoAWQ's own names."""

    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    version: str = "gemm"


@dataclass(frozen=True)
class InterleavedRows:
    """packed: int32 (in, out/8); zeros, scales: fp32 (groups, out)."""

    packed: "torch.Tensor"
    zeros: "torch.Tensor"
    scales: "torch.Tensor"
    group_size: int

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Outputs [start, stop) of the weight, fp32 (stop − start, in)."""
        first, last = start // 8, -(-stop // 8)
        inside = slice(start - first * 8, stop - first * 8)
        codes = unpack(self.packed[:, first:last], 4, ORDER)[:, inside].float()
        zeros, scales = (t[:, start:stop].repeat_interleave(self.group_size, 0) for t in (self.zeros, self.scales))
        value: torch.Tensor = (codes - zeros[: len(codes)]) * scales[: len(codes)]
        return value.T.contiguous()


@dataclass(frozen=True)
class AwqWeight(QuantizedWeight):
    group_size: int

    def load(self, source: TensorSource) -> InterleavedRows:
        packed, zeros, scales = (source.read(name) for name in self.parts)
        size = self.shape[1] if self.group_size == -1 else self.group_size
        return InterleavedRows(packed, unpack(zeros, 4, ORDER).float(), scales.float(), size)


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[AwqWeight]:
    return awq_weights(source, decoded_settings(config, AwqSettings), dtype)


def describe(settings: Mapping[str, Any]) -> str:
    return in_groups("AWQ", settings)


def awq_weights(source: TensorSource, settings: AwqSettings, dtype: str) -> list[AwqWeight]:
    """Every AWQ weight of a checkpoint, checked by headers; dtype: what the model computes in."""
    bits = settings.w_bit if settings.bits is None else settings.bits
    size = settings.q_group_size if settings.group_size is None else settings.group_size
    if bits != 4 or settings.version.lower() != "gemm":
        text = f"AWQ of version {settings.version.lower()!r} with {bits!r} bits"
        raise unread(text, "version gemm, 4 bits", ORIGINAL)
    if size is None or size == 0 or size < -1:
        raise unread(f"group_size is {size!r}", "a positive number, or -1")
    weights = []
    for module in [n.removesuffix(".qweight") for n in source.tensors if n.endswith(".qweight")]:
        weight = f"{module}.weight"
        packed, zeros = (part(source, weight, f"{module}.{n}", ("I32",)) for n in ("qweight", "qzeros"))
        scales = part(source, weight, f"{module}.scales", FLOATS)
        inputs, words = packed.shape
        expect(zeros, (groups_of(inputs, size), words))
        expect(scales, (groups_of(inputs, size), words * 8))
        parts = (packed.name, zeros.name, scales.name)
        weights.append(AwqWeight(weight, parts, (words * 8, inputs), dtype, size))
    return weights
