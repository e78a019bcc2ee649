"""compressed-tensors (vLLM's format): packed int4 and int8, plain int8 and fp8, with scales for any granularity.

pack-quantized: X.weight_packed int32 (out, in · B/32), values plus 2^(B−1), lowest bits first; X.weight_shape (2,);
X.weight_scale (out, groups); X.weight_zero_point int32 (out · B/32, groups), packed along the outputs, if it is
asymmetric; X.weight_g_idx int32 (in,) with act-order. nvfp4-pack-quantized, mxfp4-pack-quantized: X.weight_packed
U8 (out, in/2), X.weight_scale E4M3 or E8M0 as bytes, X.weight_global_scale fp32. Others: X.weight int8 or fp8,
X.weight_scale; mxfp8-quantized has it as bytes of E8M0. Experts may be fused: (experts, out, in).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.fp4 import Fp4Weight, fp4_weight
from lora_export.quantization.packed import check_groups, expect, part, unpack
from lora_export.quantization.scaled import SCALES, ScaledWeight, block_of, scaled_weight
from lora_export.storage.documents import Kind, check

if TYPE_CHECKING:
    import torch

FORMATS = (
    "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "int-quantized", "float-quantized",
    "naive-quantized", "mxfp8-quantized", "dense",
)  # fmt: skip
BITS = (4, 8)
_GROUP: Kind = {"format?": (None, str), "weights?": (None, {"block_structure?": (None, str, [int])})}
_SETTINGS: Kind = {
    "format?": (None, str),
    "config_groups?": (None, {str: _GROUP}),
    "sparsity_config?": (None, {"format?": (None, str)}),
    "transform_config?": (None, dict),
}


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
class PackedWeight:
    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
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


def find(
    source: TensorSource, settings: Mapping[str, Any], dtype: str
) -> list[PackedWeight | Fp4Weight | ScaledWeight]:
    """Every compressed weight of a checkpoint, checked by headers; dtype: what the model computes in."""
    check(settings, _SETTINGS, "quantization_config", "config.json")
    groups = settings.get("config_groups") or {}
    formats = {settings.get("format"), *(g.get("format") for g in groups.values())} - {None, "mixed-precision"}
    if not formats <= set(FORMATS) or (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise CheckpointError(
            f"compressed-tensors of the format {', '.join(sorted(map(str, formats)))}"
            + (" with sparsity" if settings.get("sparsity_config") else ""),
            where="config.json",
            expected=", ".join(FORMATS[:-1]),
            next_step="give the unquantized base model that this one was made from as -b",
        )
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise CheckpointError(
            "compressed-tensors with a transform_config: weights that were rotated, as inputs are when it runs",
            where="config.json",
            expected="weights that were quantized as they are",
            next_step="give the unquantized base model that this one was made from as -b",
        )
    found: list[PackedWeight | Fp4Weight | ScaledWeight] = []
    for name, info in source.tensors.items():
        if name.endswith(".weight_packed"):
            make = _packed if info.dtype == "I32" else _floats
            found.append(make(source, name.removesuffix("_packed"), dtype))
        elif name.endswith("_scale") and name.removesuffix("_scale") in source.tensors:
            found.append(_plain(source, name.removesuffix("_scale"), groups, dtype))
    return found


def _floats(source: TensorSource, weight: str, dtype: str) -> Fp4Weight:
    """E2M1. The global scale is what the scales were multiplied with before they were stored."""
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
        raise CheckpointError(
            f"{list(packed.shape)} words for a weight of {rows} × {columns}",
            where=packed.file,
            tensor=packed.name,
            expected="4 or 8 bits for each element",
        )
    if 0 in packed.shape or 0 in scale.shape or scale.shape[0] != rows or columns % scale.shape[1]:
        raise CheckpointError(
            f"scales of shape {list(scale.shape)}",
            where=scale.file,
            tensor=scale.name,
            expected=f"[{rows}, groups]",
        )
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


def _plain(source: TensorSource, weight: str, groups: Mapping[str, Any], dtype: str) -> ScaledWeight:
    """int8 or fp8; how many elements share a scale is told by the shape of the scales, and by a block_structure."""
    codes, scale = source.tensors[weight], source.tensors[f"{weight}_scale"]
    zero = f"{weight}_zero_point"
    blocks = [block_of((g.get("weights") or {}).get("block_structure")) for g in groups.values()]
    size = next((b for b in blocks if b and _fits(codes.shape[-2:], scale.shape[-2:], b)), None)
    used = zero if zero in source.tensors else None
    return scaled_weight(source, weight, scale.name, used, dtype, ("I8", "F8_E4M3", "F8_E5M2"), size)


def _fits(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> bool:
    return scale == tuple(-(-n // b) for n, b in zip(weight, block, strict=False))
