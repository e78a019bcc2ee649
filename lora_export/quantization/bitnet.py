"""BitNet b1.58 (arXiv:2402.17764) as transformers stores it (integrations/bitnet.py): W = (q − 1) · scale.

X.weight U8 (out / 4, in): row r of the weight lies in row r mod (out / 4), q of 0 to 2 in the two bits from
2 · (r // (out / 4)) on.
X.weight_scale, one number: linear_class "bitlinear" divides by it, "autobitlinear" multiplies with it. With
quantization_mode "online" the file has floats, which each forward makes ternary: scale = mean |W|.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.gptq import FLOATS
from lora_export.quantization.packed import part, strided

if TYPE_CHECKING:
    import torch

EVERY = 4  # values of a byte


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


def find(source: TensorSource, settings: Mapping[str, Any], dtype: str) -> list[BitnetWeight]:
    """Every ternary weight of a checkpoint, checked by headers; dtype: what the model computes in."""
    kind, mode = settings.get("linear_class", "bitlinear"), settings.get("quantization_mode", "offline")
    if kind not in ("bitlinear", "autobitlinear") or mode != "offline" or settings.get("use_rms_norm"):
        online = mode == "online"
        raise CheckpointError(
            "BitNet in the mode 'online': every forward quantizes these weights anew"
            if online
            else f"BitNet with linear_class {kind!r}, use_rms_norm {settings.get('use_rms_norm')!r}",
            where="config.json",
            expected="packed weights; no norm of its own before each layer",
            next_step="give the packed model (quantization_mode offline) as -b"
            if online
            else "no merged weight can hold such a norm; load it with transformers and PEFT, unmerged",
        )
    scales = [n for n in source.tensors if n.endswith(".weight_scale")]
    return [_weight(source, n.removesuffix("_scale"), dtype, kind == "bitlinear") for n in scales]


def _weight(source: TensorSource, weight: str, dtype: str, divides: bool) -> BitnetWeight:
    packed, scale = part(source, weight, weight, ("U8",)), part(source, weight, f"{weight}_scale", FLOATS, None)
    if math.prod(scale.shape) != 1:
        raise CheckpointError(
            f"the shape is {list(scale.shape)}", where=scale.file, tensor=scale.name, expected="one number"
        )
    shape = (packed.shape[0] * EVERY, packed.shape[1])
    return BitnetWeight(weight, (weight, scale.name), shape, dtype, divides)
