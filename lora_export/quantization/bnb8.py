"""bitsandbytes 8-bit weights (LLM.int8) as they lie on disk: X.weight int8 (out, in), X.SCB fp32 (out,)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rows8Bit:
    """One weight: W = q · SCB / 127, row by row (arXiv:2208.07339, §2.1)."""

    codes: "torch.Tensor"
    scb: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        return self.codes[start:stop].float() * self.scb[start:stop, None] / 127


@dataclass(frozen=True)
class Bnb8Weight:
    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    def load(self, source: TensorSource) -> Rows8Bit:
        module = self.weight.removesuffix(".weight")
        return Rows8Bit(source.read(self.weight), source.read(f"{module}.SCB").float())


def find(source: TensorSource, dtype: str) -> list[Bnb8Weight]:
    """Every 8-bit weight of a checkpoint; dtype is the type that the model had before (from its config)."""
    found = []
    for scb in (n for n in source.tensors if n.endswith(".SCB")):
        module = scb.removesuffix(".SCB")
        weight = source.tensors.get(f"{module}.weight")
        scales = source.tensors[scb]
        if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
            raise CheckpointError("scales without an int8 matrix", where=scales.file, tensor=scb)
        if scales.shape != weight.shape[:1]:
            raise CheckpointError(
                f"{list(scales.shape)} scales for a weight of shape {list(weight.shape)}",
                where=scales.file,
                tensor=scb,
                expected="one scale for each row",
            )
        parts = [weight.name, scb]
        layout = f"{module}.weight_format"
        if layout in source.tensors:
            _check_layout(source, layout)
            parts.append(layout)
        found.append(Bnb8Weight(weight.name, tuple(parts), weight.shape, dtype))
    return found


def _check_layout(source: TensorSource, name: str) -> None:
    info = source.tensors[name]
    if math.prod(info.shape) != 1 or info.dtype not in ("U8", "I8", "I32", "I64"):
        raise CheckpointError(
            f"the shape is {list(info.shape)}, the type {info.dtype}", where=info.file, tensor=name, expected="0"
        )
    value = int(source.read(name))
    if value != 0:
        raise CheckpointError(
            f"weight_format is {value}: a layout of tiles for one kind of GPU",
            where=info.file,
            tensor=name,
            expected="0 (row by row)",
            next_step="load the model with a current bitsandbytes and save it again",
        )
