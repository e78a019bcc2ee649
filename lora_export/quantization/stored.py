"""What all formats share: the type of a quantized weight, and checks of its parts by their headers alone."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import RowReader, TensorInfo, TensorSource
from lora_export.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FLOATS = ("F16", "BF16", "F32")
FLOATS_OF_TORCH = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the values of the codes 0 to 7; 8 to 15 are the same, negative
ORIGINAL = "give the unquantized base model that this one was made from as -b"


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """A weight of logical `shape` that is stored in several tensors, `parts`.

    dtype: what it was before it was quantized, as safetensors spells it.
    """

    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def kept(self) -> tuple[str, ...]:
        """The parts that stay in memory while rows are read."""
        return self.parts

    @abstractmethod
    def load(self, source: TensorSource) -> RowReader:
        """What computes rows of the weight in fp32."""


def folder_of(source: TensorSource) -> Path:
    """The folder of a checkpoint, for formats that need its config.json."""
    folder: Path = getattr(source, "folder")  # noqa: B009 - of a Checkpoint; tensors alone have none
    return folder


def part(
    source: TensorSource, weight: str, name: str, dtypes: Sequence[str], dimensions: int | None = 2
) -> TensorInfo:
    """The header of a tensor that a quantized weight needs; CheckpointError if it is missing or of another type.

    dimensions: how many it has, None for any number.
    """
    info = source.tensors.get(name)
    if info is None:
        owner = next(t for n, t in source.tensors.items() if n.startswith(weight.removesuffix("weight")))
        raise CheckpointError(
            f"the tensor {name} is missing", where=owner.file, tensor=weight,
            expected="all parts of a quantized weight",
        )  # fmt: skip
    if info.dtype not in dtypes:
        raise odd(info, f"the type is {info.dtype}", " or ".join(dtypes))
    if dimensions is not None and len(info.shape) != dimensions:
        raise odd(info, f"the shape is {list(info.shape)}", f"{dimensions} dimensions")
    return info


def expect(info: TensorInfo, shape: Sequence[int]) -> None:
    """Refuse a part of another shape."""
    if info.shape != tuple(shape):
        raise odd(info, f"the shape is {list(info.shape)}", str(list(shape)))


def check_groups(groups: "torch.Tensor", count: int, info: TensorInfo) -> None:
    """Refuse an input whose group does not exist. groups: the values of the tensor `info`."""
    if bool(((groups < 0) | (groups >= count)).any()):
        raise odd(info, f"an input belongs to a group beyond the {count} there are")


def groups_of(columns: int, group_size: int) -> int:
    """How many groups of inputs there are; −1 is one group for all."""
    return 1 if group_size == -1 else math.ceil(columns / group_size)


def odd(info: TensorInfo, found: str, expected: str | None = None, next_step: str | None = None) -> CheckpointError:
    """The error for a tensor that does not fit its format."""
    return CheckpointError(found, where=info.file, tensor=info.name, expected=expected, next_step=next_step)


def unread(found: str, expected: str, next_step: str | None = None) -> CheckpointError:
    """The error for settings in config.json that this tool does not read."""
    return CheckpointError(found, where="config.json", expected=expected, next_step=next_step)
