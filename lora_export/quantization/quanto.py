"""Weights of optimum-quanto (optimum/quanto/tensor/): W = q · scale, and less `shift` below 8 bits.

8 bits: X.weight._data int8 or fp8 (out, in), X.weight._scale (out, 1). 4 and 2 bits: X.weight._data._data U8 holds
the rows of a matrix (out, in), or of groups (out · in / 128, 128): row r lies in word r mod height, the lowest bits
first; X.weight._scale and X.weight._shift have a number for each of its rows. A shift that is a whole number is
subtracted from the codes, W = (q − shift) · scale; a float from their product, W = q · scale − shift. X.input_scale
and X.output_scale are of quantized activations. Beside them lies quanto_qmap.json; config.json may not name quanto.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export import meta_model
from lora_export.contracts import TensorInfo, TensorSource
from lora_export.quantization.packed import strided
from lora_export.quantization.scaled import scaled_weight
from lora_export.quantization.stored import FLOATS, QuantizedWeight, expect, folder_of, odd, part

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as …q_proj.weight._data"
ACTIVATIONS = ("input_scale", "output_scale")
EIGHT = ("I8", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class QuantoRows:
    """packed: uint8 (words, width); scale, shift: (height, 1) of the unpacked matrix."""

    packed: "torch.Tensor"
    bits: int
    scale: "torch.Tensor"
    shift: "torch.Tensor"
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the weight, fp32."""
        import torch

        per_row = self.shape[1] // self.packed.shape[1]  # groups of a row of the weight
        first, last = start * per_row, stop * per_row
        codes = strided(self.packed, self.bits, torch.arange(first, last), 8 // self.bits, low_first=True).float()
        scale, shift = self.scale[first:last].float(), self.shift[first:last]
        scaled = shift.is_floating_point()
        value = codes * scale - shift.float() if scaled else (codes - shift.float()) * scale
        return value.reshape(stop - start, self.shape[1])


@dataclass(frozen=True)
class QuantoWeight(QuantizedWeight):
    bits: int

    def load(self, source: TensorSource) -> QuantoRows:
        packed, scale, shift = (source.read(name) for name in self.parts[:3])
        return QuantoRows(packed, self.bits, scale, shift, self.shape)


def is_here(source: TensorSource) -> bool:
    """Whether the names are quanto's: its own save_pretrained leaves config.json as it was."""
    names = source.tensors
    return any(n.endswith(".weight._scale") and _codes(n.removesuffix("._scale"), names) for n in names)


def _codes(weight: str, names: Mapping[str, TensorInfo]) -> str | None:
    return next((n for n in (f"{weight}._data", f"{weight}._data._data") if n in names), None)


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[QuantizedWeight]:
    """dtype is not used: a weight has the type of its scales."""
    shapes: dict[str, tuple[int, ...]] = {}
    if any(n.endswith("._data._data") for n in source.tensors):
        shapes = {n: tuple(p.shape) for n, p in meta_model.build(folder_of(source), config).named_parameters()}
    weights: list[QuantizedWeight] = []
    for name in [n for n in source.tensors if n.endswith("._scale")]:
        weight = name.removesuffix("._scale")
        scale, module = source.tensors[name], weight.rpartition(".")[0]
        beside = [f"{module}.{n}" for n in ACTIVATIONS]
        codes = _codes(weight, source.tensors) or f"{weight}._data"
        if codes.endswith("._data._data"):
            weights.append(_packed(source, weight, codes, beside, shapes.get(weight)))
        else:
            weights.append(scaled_weight(source, weight, name, None, scale.dtype, EIGHT, None, codes, beside))
    return weights


def _packed(
    source: TensorSource, weight: str, codes: str, beside: list[str], shape: tuple[int, ...] | None
) -> QuantoWeight:
    packed = part(source, weight, codes, ("U8",))
    scale = part(source, weight, f"{weight}._scale", FLOATS)
    shift = part(source, weight, f"{weight}._shift", (*FLOATS, "I8", "U8"))
    if shape is None or len(shape) != 2:
        raise odd(
            packed,
            "the architecture that config.json names has no such matrix, so its height and width are unknown",
            "the model that was quantized",
        )
    rows, columns = shape
    words, width = packed.shape
    height = rows * columns // width if width and columns % width == 0 else 0
    bits = next((b for b in (4, 2) if height and words == math.ceil(height * b / 8)), None)
    if bits is None:
        text = f"{words} × {width} bytes for a weight of {rows} × {columns}"
        raise odd(packed, text, "4 or 2 bits for each element, in rows or groups of rows")
    expect(scale, (height, 1))
    expect(shift, (height, 1))
    present = [n for n in beside if n in source.tensors]
    return QuantoWeight(weight, (codes, scale.name, shift.name, *present), (rows, columns), scale.dtype, bits)
