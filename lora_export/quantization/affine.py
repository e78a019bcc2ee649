"""Codes of whole bytes whose file has names of its own for them: W = (q − zero) · scale, for blocks of a matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.packed import part
from lora_export.quantization.scaled import SCALES, ScaledRows, scale_values

ZEROS = ("I8", "U8", "I16", "I32", "F16", "BF16", "F32")


@dataclass(frozen=True)
class AffineWeight:
    """codes, scale, zero, beside: names of tensors; beside: what belongs to the weight and says nothing of it.
    block: rows and columns that share a scale."""

    weight: str
    codes: str
    scale: str
    zero: str | None
    beside: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.codes, self.scale, *([self.zero] if self.zero else []), *self.beside

    def load(self, source: TensorSource) -> ScaledRows:
        grid = (math.ceil(self.shape[0] / self.block[0]), math.ceil(self.shape[1] / self.block[1]))
        zero = source.read(self.zero).float().reshape(grid) if self.zero else None
        scale = scale_values(source.read(self.scale)).reshape(grid)
        return ScaledRows(source, self.codes, scale, zero, self.block)


def affine_weight(
    source: TensorSource,
    weight: str,
    names: tuple[str, str, str | None],
    beside: Sequence[str],
    dtype: str,
    types: Sequence[str],
    block: Sequence[int] | None = None,
) -> AffineWeight:
    """A weight and its parts, checked by headers.

    names: of the codes, the scales and the zeros; types: what the codes may be; block: None for what the shape of
    the scales says: a number for the whole, for each row, or for each group of a row.
    """
    codes = part(source, weight, names[0], types)
    scale = part(source, weight, names[1], SCALES, None)
    rows, columns = codes.shape
    count = math.prod(scale.shape)
    if block is None and rows and columns and count:
        across = count // rows
        whole = count == 1
        block = (rows, columns) if whole else (1, columns // across) if across and columns % across == 0 else ()
    if not block or len(block) != 2 or min(block) < 1:
        raise CheckpointError(
            f"scales of shape {list(scale.shape)} for codes of shape {list(codes.shape)}",
            where=scale.file,
            tensor=scale.name,
            expected="one for the whole, for each row, or for groups of a row",
        )
    blocks = math.ceil(rows / block[0]) * math.ceil(columns / block[1])
    zero = part(source, weight, names[2], ZEROS, None) if names[2] else None
    for info in (scale, *([zero] if zero else [])):
        if math.prod(info.shape) != blocks:
            raise CheckpointError(
                f"{math.prod(info.shape)} values for {blocks} blocks of {block[0]} × {block[1]}",
                where=info.file,
                tensor=info.name,
                expected=str(blocks),
            )
    present = tuple(n for n in beside if n in source.tensors)
    return AffineWeight(weight, *names, present, (rows, columns), dtype, (block[0], block[1]))
