"""Tensors known from headers, and what reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file, known from its header alone.

    dtype is the file's own name for it (F32, BF16, U8, …); start and end are byte offsets in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class RowReader(Protocol):
    """A weight whose rows are computed when they are asked for."""

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the first dimension, fp32."""
        ...


class TensorSource(Protocol):
    """Named tensors that are read when somebody asks, and not before."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> "torch.Tensor": ...

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the first dimension; a scalar has one."""
        ...

    def read_bytes(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Bytes [start, stop) of a tensor as they lie in the file, uint8."""
        ...
