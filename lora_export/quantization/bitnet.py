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

from lora_export import meta_model
from lora_export.contracts import TensorSource
from lora_export.quantization.packed import strided
from lora_export.quantization.settings import decoded_settings
from lora_export.quantization.stored import FLOATS, QuantizedWeight, folder_of, odd, part, unread

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as …q_proj.weight_scale"
EVERY = 4  # values of a byte
SMALLEST = 1e-5  # mean magnitude from which a scale is computed


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
class BitnetWeight(QuantizedWeight):
    """divides: whether the stored scale is the inverse of what a code counts for."""

    divides: bool

    def load(self, source: TensorSource) -> TernaryRows:
        packed, scale = (source.read(name) for name in self.parts)
        one = scale.float().reshape(())
        return TernaryRows(packed, 1 / one if self.divides else one)


@dataclass(frozen=True)
class OnlineWeight(QuantizedWeight):
    """Floats in the file, which each forward makes ternary; the scale of a matrix is of all its numbers."""

    def load(self, source: TensorSource) -> TernaryFloats:
        value = source.read(self.weight).float()
        return TernaryFloats(value, 1 / value.abs().mean().clamp(min=SMALLEST))


@dataclass(frozen=True)
class BitnetSettings:
    linear_class: str = "bitlinear"
    quantization_mode: str = "offline"
    use_rms_norm: bool | None = None
    modules_to_not_convert: tuple[str, ...] | None = None


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> Sequence[QuantizedWeight]:
    settings = decoded_settings(config, BitnetSettings)
    kind, mode = settings.linear_class, settings.quantization_mode
    known = kind in ("bitlinear", "autobitlinear") and mode in ("online", "offline")
    if not known or settings.use_rms_norm:
        raise unread(
            f"BitNet with linear_class {kind!r}, quantization_mode {mode!r}, use_rms_norm "
            f"{settings.use_rms_norm!r}",
            "layers without a norm of their own, which no merged weight can hold",
            "load it with transformers and PEFT, unmerged",
        )
    if mode == "online" and kind == "autobitlinear":
        names = [f"{m}.weight" for m in _linear(source, settings.modules_to_not_convert)]
        infos = [part(source, n, n, FLOATS) for n in names if n in source.tensors]
        return [OnlineWeight(i.name, (i.name,), i.shape, i.dtype) for i in infos]
    scales = [n for n in source.tensors if n.endswith(".weight_scale")]
    return [_weight(source, n.removesuffix("_scale"), dtype, kind == "bitlinear") for n in scales]


def _linear(source: TensorSource, kept: Sequence[str] | None) -> list[str]:
    """The modules that transformers makes ternary. kept: those that config.json excludes."""
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = meta_model.build(folder_of(source))
    kept = get_keys_to_not_convert(model) if kept is None else list(kept)
    modules = model.named_modules()
    return [n for n, m in modules if type(m) is torch.nn.Linear and should_convert_module(n, kept)]


def _weight(source: TensorSource, weight: str, dtype: str, divides: bool) -> BitnetWeight:
    packed, scale = part(source, weight, weight, ("U8",)), part(source, weight, f"{weight}_scale", FLOATS, None)
    if math.prod(scale.shape) != 1:
        raise odd(scale, f"the shape is {list(scale.shape)}", "one number")
    shape = (packed.shape[0] * EVERY, packed.shape[1])
    return BitnetWeight(weight, (weight, scale.name), shape, dtype, divides)
