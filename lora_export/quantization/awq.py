"""AWQ weights (arXiv:2306.00978) of AutoAWQ's version "gemm": W[o, i] = (q[i, o] − zero[g, o]) · scale[g, o].

Layout: X.qweight int32 (in, out/8); X.qzeros int32 (groups, out/8); X.scales (groups, out). The eight 4-bit values
of a word are the outputs 0, 2, 4, 6, 1, 3, 5, 7 of its block, lowest bits first. With zero_point false (AutoRound)
X.qzeros is there all the same, with 8 in every place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.gptq import FLOATS
from lora_export.quantization.packed import expect, groups_of, part, unpack

if TYPE_CHECKING:
    import torch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
class AwqWeight:
    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    group_size: int

    def load(self, source: TensorSource) -> InterleavedRows:
        packed, zeros, scales = (source.read(name) for name in self.parts)
        size = self.shape[1] if self.group_size == -1 else self.group_size
        return InterleavedRows(packed, unpack(zeros, 4, ORDER).float(), scales.float(), size)


def find(source: TensorSource, settings: Mapping[str, Any], dtype: str) -> list[AwqWeight]:
    """Every AWQ weight of a checkpoint, checked by headers; dtype: what the model computes in."""
    bits = settings.get("bits", settings.get("w_bit"))
    size = settings.get("group_size", settings.get("q_group_size"))
    version = str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise CheckpointError(
            f"AWQ of version {version!r} with {bits!r} bits",
            where="config.json",
            expected="version gemm, 4 bits",
            next_step="give the unquantized base model that this one was made from as -b",
        )
    if not isinstance(size, int) or size == 0 or size < -1:
        raise CheckpointError(f"group_size is {size!r}", where="config.json", expected="a number, or -1")
    found = []
    for module in [n.removesuffix(".qweight") for n in source.tensors if n.endswith(".qweight")]:
        weight = f"{module}.weight"
        packed = part(source, weight, f"{module}.qweight", ("I32",))
        zeros = part(source, weight, f"{module}.qzeros", ("I32",))
        scales = part(source, weight, f"{module}.scales", FLOATS)
        inputs, words = packed.shape
        expect(zeros, (groups_of(inputs, size), words))
        expect(scales, (groups_of(inputs, size), words * 8))
        parts = (packed.name, zeros.name, scales.name)
        found.append(AwqWeight(weight, parts, (words * 8, inputs), dtype, size))
    return found
