"""compressed-tensors (vLLM's format): packed int4 and int8, plain int8 and fp8, with scales for any granularity.

pack-quantized: X.weight_packed int32 (out, in · B/32), values plus 2^(B−1), lowest bits first; X.weight_shape (2,);
X.weight_scale (out, groups); X.weight_zero_point int32 (out · B/32, groups), packed along the outputs, if it is
asymmetric; X.weight_g_idx int32 (in,) with act-order. nvfp4-pack-quantized, mxfp4-pack-quantized: X.weight_packed
U8 (out, in/2), X.weight_scale E4M3 or E8M0 as bytes, X.weight_global_scale fp32. Others: X.weight int8 or fp8,
X.weight_scale; mxfp8-quantized has it as bytes of E8M0. Experts may be fused: (experts, out, in).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.quantization.fp4 import Fp4Weight, fp4_weight
from lora_export.quantization.packed import unpack
from lora_export.quantization.scaled import SCALES, ScaledWeight, block_of, scaled_weight
from lora_export.quantization.settings import decoded_settings
from lora_export.quantization.stored import ORIGINAL, QuantizedWeight, check_groups, expect, odd, part, unread

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as …q_proj.weight_packed or …q_proj.weight_scale"
LAYOUTS = (
    "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "int-quantized", "float-quantized",
    "naive-quantized", "mxfp8-quantized", "dense",
)  # fmt: skip
BITS = (4, 8)


@dataclass(frozen=True)
class WeightScheme:
    block_structure: str | tuple[int, ...] | None = None


@dataclass(frozen=True)
class SchemeGroup:
    format: str | None = None
    weights: WeightScheme | None = None


@dataclass(frozen=True)
class Sparsity:
    format: str | None = "dense"


@dataclass(frozen=True)
class Transforms:
    config_groups: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CompressedSettings:
    format: str | None = None
    config_groups: Mapping[str, SchemeGroup] | None = field(default_factory=dict)
    sparsity_config: Sparsity | None = None
    transform_config: Transforms | None = None


@dataclass(frozen=True)
class PackedRows:
    """packed: int32 (out, words); scale, zero: fp32 (out, groups); groups: int64 (in,)."""

    packed: "torch.Tensor"
    bits: int
    scale: "torch.Tensor"
    zero: "torch.Tensor | None"
    groups: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) in fp32: (q − 2^(B−1) − zero) · scale."""
        codes = unpack(self.packed[start:stop], self.bits)[:, : len(self.groups)].float() - (1 << (self.bits - 1))
        if self.zero is not None:
            codes = codes - self.zero[start:stop][:, self.groups]
        value: torch.Tensor = codes * self.scale[start:stop][:, self.groups]
        return value


@dataclass(frozen=True)
class PackedWeight(QuantizedWeight):
    bits: int

    def load(self, source: TensorSource) -> PackedRows:
        import torch

        scale = source.read(f"{self.weight}_scale").float()
        groups = torch.arange(self.shape[1]) // -(-self.shape[1] // scale.shape[1])
        if f"{self.weight}_g_idx" in self.parts:
            groups = source.read(f"{self.weight}_g_idx").long()
            check_groups(groups, scale.shape[1], source.tensors[f"{self.weight}_g_idx"])
        zero = None
        if f"{self.weight}_zero_point" in self.parts:
            zero = source.read(f"{self.weight}_zero_point")
            if zero.dtype == torch.int32:  # packed along the outputs
                zero = unpack(zero.T.contiguous(), self.bits).T[: self.shape[0]] - (1 << (self.bits - 1))
            zero = zero.float()
        return PackedRows(source.read(self.parts[0]), self.bits, scale, zero, groups)


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[QuantizedWeight]:
    settings = decoded_settings(config, CompressedSettings)
    groups = list((settings.config_groups or {}).values())
    layouts = {settings.format, *(g.format for g in groups)} - {None, "mixed-precision"}
    sparsity = settings.sparsity_config
    if not layouts <= set(LAYOUTS) or (sparsity is not None and sparsity.format != "dense"):
        text = f"compressed-tensors of the format {', '.join(sorted(map(str, layouts)))}"
        raise unread(text + (" with sparsity" if sparsity else ""), ", ".join(LAYOUTS[:-1]), ORIGINAL)
    if settings.transform_config is not None and settings.transform_config.config_groups:
        text = (
            "compressed-tensors with a transform_config: its weights are rotated, and so are its inputs at run time"
        )
        raise unread(text, "weights that were quantized as they are", ORIGINAL)
    weights: list[QuantizedWeight] = []
    for name, info in source.tensors.items():
        if name.endswith(".weight_packed"):
            make = _packed if info.dtype == "I32" else _floats
            weights.append(make(source, name.removesuffix("_packed"), dtype))
        elif name.endswith("_scale") and name.removesuffix("_scale") in source.tensors:
            weights.append(_plain(source, name.removesuffix("_scale"), groups, dtype))
    return weights


def _floats(source: TensorSource, weight: str, dtype: str) -> Fp4Weight:
    """E2M1. The scales were multiplied by the global scale before they were stored."""
    whole = f"{weight}_global_scale"
    parts = (f"{weight}_packed", f"{weight}_scale", *([whole] if whole in source.tensors else []))
    return fp4_weight(source, weight, parts, dtype, divided=True)


def _packed(source: TensorSource, weight: str, dtype: str) -> PackedWeight:
    packed = part(source, weight, f"{weight}_packed", ("I32",))
    scale = part(source, weight, f"{weight}_scale", SCALES)
    size = part(source, weight, f"{weight}_shape", ("I64", "I32"), 1)
    expect(size, (2,))
    rows, columns = (int(n) for n in source.read(size.name).tolist())
    bits = next((b for b in BITS if packed.shape == (rows, -(-columns * b // 32))), None)
    if bits is None:
        text = f"{list(packed.shape)} words for a weight of {rows} × {columns}"
        raise odd(packed, text, "4 or 8 bits for each element")
    if 0 in packed.shape or 0 in scale.shape or scale.shape[0] != rows or columns % scale.shape[1]:
        raise odd(scale, f"scales of shape {list(scale.shape)}", f"[{rows}, groups]")
    parts = [packed.name, scale.name, size.name]
    if f"{weight}_zero_point" in source.tensors:
        zero = part(source, weight, f"{weight}_zero_point", ("I32", "I8"))
        expect(zero, (-(-rows * bits // 32) if zero.dtype == "I32" else rows, scale.shape[1]))
        parts.append(zero.name)
    if f"{weight}_g_idx" in source.tensors:
        order = part(source, weight, f"{weight}_g_idx", ("I32", "I64"), 1)
        expect(order, (columns,))
        parts.append(order.name)
    return PackedWeight(weight, tuple(parts), (rows, columns), dtype, bits)


def _plain(source: TensorSource, weight: str, groups: Sequence[SchemeGroup], dtype: str) -> ScaledWeight:
    """int8 or fp8; how many elements share a scale follows from the shape of the scales and a block_structure."""
    codes, scale = source.tensors[weight], source.tensors[f"{weight}_scale"]
    zero = f"{weight}_zero_point"
    blocks = [block_of(g.weights.block_structure) for g in groups if g.weights]
    size = next((b for b in blocks if b and _fits(codes.shape[-2:], scale.shape[-2:], b)), None)
    used = zero if zero in source.tensors else None
    return scaled_weight(source, weight, scale.name, used, dtype, ("I8", "F8_E4M3", "F8_E5M2"), size)


def _fits(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> bool:
    return scale == tuple(-(-n // b) for n, b in zip(weight, block, strict=False))
