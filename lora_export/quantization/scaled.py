"""Weights that lie unpacked (fp8, int8), with scales for tensors, rows, groups or blocks: W = (q − zero) · scale.

fp8 as DeepSeek and transformers save it: X.weight F8_E4M3 (out, in), X.weight_scale_inv fp32 or E8M0, one a block
(short blocks at the ends are legal). compressed-tensors: X.weight, X.weight_scale and maybe X.weight_zero_point.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.documents import check
from lora_export.errors import CheckpointError
from lora_export.quantization.packed import part

if TYPE_CHECKING:
    import torch

Block = tuple[int | None, int | None]  # rows and columns that share a scale; None for all of them
SCALES = ("F32", "BF16", "F16", "F8_E8M0")


@dataclass(frozen=True)
class ScaledRows:
    """codes: (out, in); scale and zero: (rows, columns) of blocks of `block` elements."""

    codes: "torch.Tensor"
    scale: "torch.Tensor"
    zero: "torch.Tensor | None"
    block: tuple[int, int]

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) in fp32."""
        value = self.codes[start:stop].float()
        if self.zero is not None:
            value = value - self._spread(self.zero, start, stop)
        return value * self._spread(self.scale, start, stop)

    def _spread(self, blocks: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
        import torch

        height, width = self.block
        row, column = torch.arange(start, stop) // height, torch.arange(self.codes.shape[1]) // width
        return blocks.float()[row][:, column]


@dataclass(frozen=True)
class ScaledWeight:
    """block: the (rows, columns) that share a scale."""

    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    block: tuple[int, int]

    def load(self, source: TensorSource) -> ScaledRows:
        codes, scale, *rest = (source.read(name) for name in self.parts)
        grid = tuple(math.ceil(n / b) for n, b in zip(self.shape, self.block, strict=True))
        zero = rest[0].reshape(grid) if rest else None
        return ScaledRows(codes, scale.reshape(grid), zero, self.block)


def find_fp8(source: TensorSource, settings: Mapping[str, Any], dtype: str) -> list[ScaledWeight]:
    """Every weight with a `weight_scale_inv`; dtype: what the model computes in, from its config."""
    check(settings, {"weight_block_size?": (None, [int])}, "quantization_config", "config.json")
    size = settings.get("weight_block_size")
    block: Block = block_of(size) or (None, None)
    if size and block == (None, None):
        raise CheckpointError(
            f"weight_block_size is {size!r}", where="config.json", expected="the height and width of a block"
        )
    found = []
    for name in [n for n in source.tensors if n.endswith(".weight_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        found.append(scaled_weight(source, weight, name, None, dtype, ("F8_E4M3",), block))
    return found


def block_of(value: Any) -> tuple[int, int] | None:
    """[height, width] of a configuration; None for anything else, such as a text."""
    if isinstance(value, list) and len(value) == 2 and all(n > 0 for n in value):
        return value[0], value[1]
    return None


def scaled_weight(
    source: TensorSource,
    weight: str,
    scale: str,
    zero: str | None,
    dtype: str,
    types: tuple[str, ...],
    block: Block,
) -> ScaledWeight:
    """A weight and its scales, checked by headers. block: None where one scale holds for the whole dimension."""
    codes, scales = part(source, weight, weight, types), part(source, weight, scale, SCALES, None)
    height, width = (n if b is None else b for n, b in zip(codes.shape, block, strict=True))
    if not all(isinstance(n, int) and n > 0 for n in (height, width)):
        raise _odd(codes, f"blocks of {block}", "two positive numbers")
    blocks = math.ceil(codes.shape[0] / height) * math.ceil(codes.shape[1] / width)
    for info in (scales, *([source.tensors[zero]] if zero else [])):
        if math.prod(info.shape) != blocks:
            raise _odd(
                info, f"{math.prod(info.shape)} values for {blocks} blocks of {height} × {width}", str(blocks)
            )
    parts = (codes.name, scales.name, *([zero] if zero else []))
    return ScaledWeight(weight, parts, codes.shape, dtype, (height, width))


def _odd(info: TensorInfo, found: str, expected: str) -> CheckpointError:
    return CheckpointError(found, where=info.file, tensor=info.name, expected=expected)
