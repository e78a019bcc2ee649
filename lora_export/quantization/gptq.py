"""GPTQ weights (arXiv:2210.17323) of AutoGPTQ and GPTQModel: W[o, i] = scale[g, o] · (q[i, o] − zero[g, o]).

Layout for B bits: X.qweight int32 (in · B/32, out), packed along the inputs; X.qzeros int32 (groups, out · B/32),
packed along the outputs; X.scales (groups, out); X.g_idx int32 (in,), the group of each input.
The format "gptq" stores zeros less one, "gptq_v2" stores them as they are. GPTQModel's `dynamic` and AutoRound's
`extra_config` give single modules bits and groups of their own: the shapes tell them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.packed import check_groups, expect, groups_of, part, unpack

if TYPE_CHECKING:
    import torch

FLOATS = ("F16", "BF16", "F32")
BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class GroupedRows:
    """codes: int32 (in, out · B/32 …) still packed; zeros, scales: fp32 (groups, out); groups: int64 (in,)."""

    packed: "torch.Tensor"
    bits: int
    zeros: "torch.Tensor"
    scales: "torch.Tensor"
    groups: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Outputs [start, stop) of the weight, fp32 (stop − start, in)."""
        codes = unpack(self.packed[:, start:stop].T.contiguous(), self.bits)[:, : len(self.groups)]
        zeros, scales = (t[:, start:stop].T[:, self.groups] for t in (self.zeros, self.scales))
        value: torch.Tensor = (codes.float() - zeros) * scales
        return value


@dataclass(frozen=True)
class GptqWeight:
    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bits: int
    group_size: int
    stored_less_one: bool

    def load(self, source: TensorSource) -> GroupedRows:
        import torch

        module = self.weight.removesuffix(".weight")
        mask = (1 << self.bits) - 1
        zeros = unpack(source.read(f"{module}.qzeros"), self.bits)
        if self.stored_less_one:
            zeros = (zeros + 1) & mask
        inputs = torch.arange(self.shape[1])
        groups = inputs // (self.shape[1] if self.group_size == -1 else self.group_size)
        scales = source.read(f"{module}.scales").float()
        if f"{module}.g_idx" in self.parts:
            groups = source.read(f"{module}.g_idx").long()
            check_groups(groups, len(scales), source.tensors[f"{module}.g_idx"])
        return GroupedRows(source.read(f"{module}.qweight"), self.bits, zeros.float(), scales, groups)


def find(source: TensorSource, settings: Mapping[str, Any], dtype: str) -> list[GptqWeight]:
    """Every GPTQ weight of a checkpoint, checked by headers; dtype: what the model computes in."""
    bits, group_size = settings.get("bits"), settings.get("group_size")
    if bits not in BITS:
        raise CheckpointError(
            f"GPTQ with {bits!r} bits", where="config.json", expected=f"{', '.join(map(str, BITS))} bits"
        )
    if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        raise CheckpointError(f"group_size is {group_size!r}", where="config.json", expected="a number, or -1")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"checkpoint_format is {layout!r}", where="config.json", expected="gptq or gptq_v2",
            next_step="give the unquantized base model that this one was made from as -b",
        )  # fmt: skip
    names = [n.removesuffix(".qweight") for n in source.tensors if n.endswith(".qweight")]
    found = []
    for name in names:
        own = _of_shapes(source, name) if settings.get("dynamic") or settings.get("extra_config") else None
        size, width = own or (group_size, int(bits))
        found.append(_weight(source, name, width, size, layout == "gptq", dtype))
    return found


def _of_shapes(source: TensorSource, module: str) -> tuple[int, int]:
    """(group size, bits) of one module, as its zeros, scales and codes have them."""
    weight = f"{module}.weight"
    packed = part(source, weight, f"{module}.qweight", ("I32",))
    scales = part(source, weight, f"{module}.scales", FLOATS)
    zeros = part(source, weight, f"{module}.qzeros", ("I32",))
    groups, outputs = scales.shape
    bits = next((b for b in BITS if zeros.shape == (groups, outputs * b // 32)), None)
    if bits is None or not groups or packed.shape[0] % bits:
        raise CheckpointError(
            f"zeros of shape {list(zeros.shape)} and codes of shape {list(packed.shape)} for scales of shape "
            f"{list(scales.shape)}",
            where=zeros.file,
            tensor=zeros.name,
            expected=f"{', '.join(map(str, BITS))} bits for each value",
        )
    return math.ceil(packed.shape[0] * 32 // bits / groups), bits


def _weight(
    source: TensorSource, module: str, bits: int, group_size: int, less_one: bool, dtype: str
) -> GptqWeight:
    weight = f"{module}.weight"
    packed = part(source, weight, f"{module}.qweight", ("I32",))
    scales = part(source, weight, f"{module}.scales", FLOATS)
    zeros = part(source, weight, f"{module}.qzeros", ("I32",))
    words, outputs = packed.shape
    if words * 32 % bits or outputs * bits % 32:
        raise CheckpointError(
            f"{words} × {outputs} words do not hold whole values of {bits} bits",
            where=packed.file,
            tensor=packed.name,
            expected="the bits that config.json names",
        )
    inputs, parts = words * 32 // bits, [packed.name, scales.name, zeros.name]
    if f"{module}.g_idx" in source.tensors:
        order = part(source, weight, f"{module}.g_idx", ("I32", "I64"), 1)
        expect(order, (inputs,))
        parts.append(order.name)
    groups = groups_of(inputs, group_size)
    expect(scales, (groups, outputs))
    expect(zeros, (groups, outputs * bits // 32))
    if f"{module}.bias" in source.tensors:
        expect(source.tensors[f"{module}.bias"], (outputs,))
    return GptqWeight(weight, tuple(parts), (outputs, inputs), dtype, bits, group_size, less_one)
