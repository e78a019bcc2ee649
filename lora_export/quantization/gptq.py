"""GPTQ weights (arXiv:2210.17323) of AutoGPTQ and GPTQModel: W[o, i] = scale[g, o] · (q[i, o] − zero[g, o]).

Layout for B bits: X.qweight int32 (in · B/32, out), packed along the inputs; X.qzeros int32 (groups, out · B/32),
packed along the outputs; X.scales (groups, out); X.g_idx int32 (in,), the group of each input.
The format "gptq" stores zeros less one, "gptq_v2" stores them as they are. GPTQModel's `dynamic` and AutoRound's
`extra_config` give single modules bits and groups of their own, which follow from the shapes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.quantization.packed import unpack
from lora_export.quantization.settings import decoded_settings
from lora_export.quantization.stored import (
    FLOATS,
    ORIGINAL,
    QuantizedWeight,
    check_groups,
    expect,
    groups_of,
    odd,
    part,
    unread,
)

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as …q_proj.qweight"
BITS = (2, 3, 4, 5, 6, 7, 8)
_EACH = ", ".join(map(str, BITS))


@dataclass(frozen=True)
class GptqSettings:
    bits: int | None = None
    group_size: int | None = None
    checkpoint_format: str | None = None
    format: str | None = None
    dynamic: Mapping[str, Any] | None = None
    extra_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class GroupedRows:
    """packed: int32 (in · B/32, out); zeros, scales: fp32 (groups, out); groups: int64 (in,)."""

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
class GptqWeight(QuantizedWeight):
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


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[GptqWeight]:
    return gptq_weights(source, decoded_settings(config, GptqSettings), dtype)


def describe(settings: Mapping[str, Any]) -> str:
    return in_groups("GPTQ", settings)


def in_groups(name: str, settings: Mapping[str, Any]) -> str:
    """The settings of any format that has bits and groups, in a few words."""
    order = ", act-order" if settings.get("desc_act") else ""
    return f"{name} {settings.get('bits')} bits, groups of {settings.get('group_size')}{order}"


def gptq_weights(source: TensorSource, settings: GptqSettings, dtype: str) -> list[GptqWeight]:
    """Every GPTQ weight of a checkpoint, checked by headers; dtype: what the model computes in."""
    bits, group_size = settings.bits, settings.group_size
    if bits not in BITS:
        raise unread(f"GPTQ with {bits!r} bits", f"{_EACH} bits")
    if group_size is None or group_size == 0 or group_size < -1:
        raise unread(f"group_size is {group_size!r}", "a positive number, or -1")
    layout = settings.checkpoint_format or settings.format or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise unread(f"checkpoint_format is {layout!r}", "gptq or gptq_v2", ORIGINAL)
    weights = []
    for module in [n.removesuffix(".qweight") for n in source.tensors if n.endswith(".qweight")]:
        own = _of_shapes(source, module) if settings.dynamic or settings.extra_config else None
        weights.append(_weight(source, module, *(own or (group_size, bits)), layout == "gptq", dtype))
    return weights


def _of_shapes(source: TensorSource, module: str) -> tuple[int, int]:
    """(group size, bits) of one module, as its zeros, scales and codes show them."""
    packed, scales, zeros = _parts(source, module)
    groups, outputs = scales.shape
    bits = next((b for b in BITS if zeros.shape == (groups, outputs * b // 32)), None)
    if bits is None or not groups or packed.shape[0] % bits:
        text = f"zeros {list(zeros.shape)} and codes {list(packed.shape)} for scales of shape {list(scales.shape)}"
        raise odd(zeros, text, f"{_EACH} bits for each value")
    return math.ceil(packed.shape[0] * 32 // bits / groups), bits


def _parts(source: TensorSource, module: str) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
    weight = f"{module}.weight"
    packed = part(source, weight, f"{module}.qweight", ("I32",))
    scales = part(source, weight, f"{module}.scales", FLOATS)
    return packed, scales, part(source, weight, f"{module}.qzeros", ("I32",))


def _weight(
    source: TensorSource, module: str, group_size: int, bits: int, less_one: bool, dtype: str
) -> GptqWeight:
    weight, (packed, scales, zeros) = f"{module}.weight", _parts(source, module)
    words, outputs = packed.shape
    if words * 32 % bits or outputs * bits % 32:
        text = f"{words} × {outputs} words do not hold whole values of {bits} bits"
        raise odd(packed, text, "the bits that config.json names")
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
