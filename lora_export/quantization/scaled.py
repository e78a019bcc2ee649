"""Weights that lie unpacked (fp8, int8), with scales for tensors, rows, groups or blocks: W = (q − zero) · scale.

A weight is a matrix (out, in), or a matrix for each expert (experts, height, width); the scales are a grid of
blocks of each matrix, whose last blocks may be short.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.quantization.stored import QuantizedWeight, odd, part

if TYPE_CHECKING:
    import torch

Block = tuple[int, int]
POWERS = ("F8_E8M0", "U8")  # eight bits of exponent, by their own type or as bytes
SCALES = ("F32", "BF16", "F16", *POWERS)
ZEROS = ("I8", "U8", "I16", "I32", "F16", "BF16", "F32")


def scale_values(scale: "torch.Tensor") -> "torch.Tensor":
    """Scales in fp32. Bytes are exponents, 2^(b − 127), and 255 is NaN (OCP Microscaling Formats, E8M0)."""
    import torch

    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def multiply(values: "torch.Tensor", scale: "torch.Tensor", width: int) -> "torch.Tensor":
    """values (…, columns) fp32, changed in place, times scale (…, groups) of `width` columns each."""
    columns, groups = values.shape[-1], scale.shape[-1]
    if groups == 1:
        return values.mul_(scale)
    if columns == groups * width:
        values.view(*values.shape[:-1], groups, width).mul_(scale[..., None])
        return values
    return values.mul_(_columns(scale, width, columns))


def _columns(blocks: "torch.Tensor", width: int, columns: int) -> "torch.Tensor":
    import torch

    return blocks[..., torch.arange(columns) // width]


@dataclass(frozen=True)
class ScaledRows:
    """codes: the name of the tensor; scale and zero: fp32 (…, rows, columns) of blocks of `block` elements."""

    source: TensorSource
    codes: str
    scale: "torch.Tensor"
    zero: "torch.Tensor | None"
    block: Block

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows of a matrix, or experts, [start, stop) in fp32."""
        value = self.source.read_rows(self.codes, start, stop).float()
        if self.zero is not None:
            value.sub_(_columns(self._of(self.zero, start, stop, value), self.block[1], value.shape[-1]))
        return multiply(value, self._of(self.scale, start, stop, value), self.block[1])

    def _of(self, blocks: "torch.Tensor", start: int, stop: int, value: "torch.Tensor") -> "torch.Tensor":
        """The grid's columns for each row of `value`."""
        import torch

        if value.dim() == 2:
            return blocks[torch.arange(start, stop) // self.block[0]]
        return blocks[start:stop, torch.arange(value.shape[1]) // self.block[0]]


@dataclass(frozen=True)
class ScaledWeight(QuantizedWeight):
    """parts: codes, scales, zeros if there are any, and what belongs to the weight without a meaning for it.

    grid: the shape of the scales, with the experts in front; block: the (rows, columns) that share one.
    """

    grid: tuple[int, ...]
    block: Block
    has_zero: bool

    @property
    def kept(self) -> tuple[str, ...]:
        return self.parts[1:]

    def load(self, source: TensorSource) -> ScaledRows:
        scale = scale_values(source.read(self.parts[1]))
        zero = self._grid(source.read(self.parts[2]).float()) if self.has_zero else None
        return ScaledRows(source, self.parts[0], self._grid(scale), zero, self.block)

    def _grid(self, values: "torch.Tensor") -> "torch.Tensor":
        """A single value stands for all experts."""
        return values.reshape(()).expand(self.grid) if values.numel() == 1 else values.reshape(self.grid)


def block_of(value: Any) -> Block | None:
    """(height, width) of a configuration; None for anything else, such as a text."""
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    return None


def scaled_weight(
    source: TensorSource,
    weight: str,
    scale: str,
    zero: str | None,
    dtype: str,
    types: tuple[str, ...],
    size: Block | None,
    codes: str | None = None,
    beside: Sequence[str] = (),
) -> ScaledWeight:
    """A weight and its scales, checked by headers.

    types: what the codes may be; size: of the blocks that the configuration names, if it does; else the scales
    divide the weight evenly, as their shape says. codes: the name of their tensor, if it is not the weight's;
    beside: tensors that belong to the weight, where they are there, and have no meaning for it.
    """
    numbers = part(source, weight, codes or weight, types, None)
    scales = part(source, weight, scale, SCALES, None)
    if len(numbers.shape) not in (2, 3) or 0 in numbers.shape:
        raise odd(numbers, f"the shape is {list(numbers.shape)}", "2 dimensions, or 3 with experts in front")
    layout = _layout(numbers.shape, scales.shape, size)
    if layout is None:
        blocks = f"blocks of {size[0]} × {size[1]}" if size else "even blocks"
        text = f"scales of shape {list(scales.shape)} for a weight of {list(numbers.shape)} in {blocks}"
        raise odd(scales, text, "one for the tensor, or as many as there are rows or blocks")
    grid, block = layout
    if zero is not None:
        count = math.prod(part(source, weight, zero, ZEROS, None).shape)
        if count != math.prod(grid):
            raise odd(source.tensors[zero], f"{count} values", str(math.prod(grid)))
    parts = (numbers.name, scales.name, *([zero] if zero else []), *(n for n in beside if n in source.tensors))
    return ScaledWeight(weight, parts, numbers.shape, dtype, grid, block, zero is not None)


def _layout(
    codes: Sequence[int], scales: Sequence[int], size: Block | None
) -> tuple[tuple[int, ...], Block] | None:
    """(grid, block) of scales of this shape; None if they fit no grid of blocks of one size."""
    *experts, height, width = codes
    count = math.prod(scales)
    if count in (1, math.prod(experts)):
        return (*experts, 1, 1), (height, width)
    if size is not None:
        rows, columns = (math.ceil(n / b) for n, b in zip((height, width), size, strict=True))
        return ((*experts, rows, columns), size) if count == math.prod(experts) * rows * columns else None
    inner = list(scales[len(experts) :]) if list(scales[: len(experts)]) == experts else []
    if len(inner) == 4 and inner[1] == inner[3] == 1:  # (rows, 1, columns, 1), as modelopt keeps blocks
        inner = inner[::2]
    rows, columns = [*inner, 1][:2] if len(inner) in (1, 2) else (0, 0)
    if rows < 1 or columns < 1 or height % rows or width % columns:
        return None
    return (*experts, rows, columns), (height // rows, width // columns)
