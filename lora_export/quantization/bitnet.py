"""BitNet b1.58 (arXiv:2402.17764) as transformers stores it (integrations/bitnet.py): W = (q − 1) · scale.

X.weight U8 (out / 4, in): row r of the weight lies in row r mod (out / 4), q of 0 to 2 in the two bits from
2 · (r // (out / 4)) on.
X.weight_scale, one number: linear_class "bitlinear" divides by it, "autobitlinear" multiplies with it. With
quantization_mode "online" the file has floats, which each forward makes ternary: round(W / scale) · scale, within
± scale, with scale = mean |W|.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export import meta_model as skeleton
from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.gptq import FLOATS
from lora_export.quantization.packed import folder_of, part, strided

if TYPE_CHECKING:
    import torch

EVERY = 4  # values of a byte
SMALLEST = 1e-5  # mean magnitude that a scale is taken of


@dataclass(frozen=True)
class TernaryRows:
    """packed: uint8 (out / 4, in); scale: fp32, one number."""

    packed: "torch.Tensor"
    scale: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        import torch

        codes = strided(self.packed, 2, torch.arange(start, stop), EVERY, low_first=True)
        return (codes.float() - 1) * self.scale


@dataclass(frozen=True)
class TernaryFloats:
    """value: fp32 (out, in); scale: one over the mean of its magnitudes."""

    value: "torch.Tensor"
    scale: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        ternary = (self.value[start:stop] * self.scale).round().clamp(-1, 1)
        return ternary / self.scale


@dataclass(frozen=True)
class BitnetWeight:
    """divides: whether the stored scale is the inverse of what a code counts for."""

    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    divides: bool

    def load(self, source: TensorSource) -> TernaryRows:
        packed, scale = (source.read(name) for name in self.parts)
        one = scale.float().reshape(())
        return TernaryRows(packed, 1 / one if self.divides else one)


@dataclass(frozen=True)
class OnlineWeight:
    """Floats in the file, that each forward makes ternary; a matrix's scale is of all its numbers."""

    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    def load(self, source: TensorSource) -> TernaryFloats:
        value = source.read(self.weight).float()
        return TernaryFloats(value, 1 / value.abs().mean().clamp(min=SMALLEST))


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> Sequence[BitnetWeight | OnlineWeight]:
    """Every ternary weight of a checkpoint, checked by headers; dtype: what the model computes in."""
    settings = config["quantization_config"]
    kind, mode = settings.get("linear_class", "bitlinear"), settings.get("quantization_mode", "offline")
    known = kind in ("bitlinear", "autobitlinear") and mode in ("online", "offline")
    if not known or settings.get("use_rms_norm"):
        raise CheckpointError(
            f"BitNet with linear_class {kind!r}, quantization_mode {mode!r}, "
            f"use_rms_norm {settings.get('use_rms_norm')!r}",
            where="config.json",
            expected="no norm of its own before each layer, which no merged weight can hold",
            next_step="load it with transformers and PEFT, unmerged",
        )
    if mode == "online" and kind == "autobitlinear":
        names = [f"{m}.weight" for m in _linear(source, settings.get("modules_to_not_convert"))]
        infos = [part(source, n, n, FLOATS) for n in names if n in source.tensors]
        return [OnlineWeight(i.name, (i.name,), i.shape, i.dtype) for i in infos]
    scales = [n for n in source.tensors if n.endswith(".weight_scale")]
    return [_weight(source, n.removesuffix("_scale"), dtype, kind == "bitlinear") for n in scales]


def _linear(source: TensorSource, kept: Sequence[str] | None) -> list[str]:
    """The modules that transformers would make ternary. kept: those that config.json names as others."""
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = skeleton.build(folder_of(source))
    kept = get_keys_to_not_convert(model) if kept is None else kept
    modules = model.named_modules()
    return [n for n, m in modules if type(m) is torch.nn.Linear and should_convert_module(n, kept)]


def _weight(source: TensorSource, weight: str, dtype: str, divides: bool) -> BitnetWeight:
    packed, scale = part(source, weight, weight, ("U8",)), part(source, weight, f"{weight}_scale", FLOATS, None)
    if math.prod(scale.shape) != 1:
        raise CheckpointError(
            f"the shape is {list(scale.shape)}", where=scale.file, tensor=scale.name, expected="one number"
        )
    shape = (packed.shape[0] * EVERY, packed.shape[1])
    return BitnetWeight(weight, (weight, scale.name), shape, dtype, divides)
