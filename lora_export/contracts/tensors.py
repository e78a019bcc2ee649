"""Tensors known from headers, the source that gives their bytes, and the sink that takes bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_export.errors import CheckpointError

if TYPE_CHECKING:
    import torch

STRETCH = 2**20  # bytes that are copied, and then hashed while they are in the processor's cache
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def torch_dtype(name: str) -> "torch.dtype":
    """torch's type for a safetensors dtype name. CheckpointError for F4 and F6, whose values torch cannot hold."""
    import torch

    if name not in _TORCH_NAMES:
        raise CheckpointError(f"torch has no type for {name}", expected=", ".join(_TORCH_NAMES))
    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def file_dtype(name: str) -> str:
    """The safetensors name of a torch type's name: bfloat16 → BF16."""
    return {v: k for k, v in _TORCH_NAMES.items()}[name]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, known from a header alone.

    dtype is the file's own name for it (F32, BF16, U8, …); start and end are byte offsets in the file. source gives
    its bytes; file names it in errors and decides its shard, and need not exist where the source is no file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    source: "TensorSource" = field(compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def height(self) -> int:
        """Rows; a scalar has one."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        return self.nbytes // self.height if self.height else 0

    def read_bytes(self, start: int, stop: int) -> "torch.Tensor":
        """Bytes [start, stop) as they are stored, uint8. CheckpointError where they cannot be read."""
        import torch

        buffer = torch.empty(stop - start, dtype=torch.uint8)
        self.source.read_into(self, start, memoryview(buffer.numpy().data))
        return buffer

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the first dimension, shape (stop − start, …), in the tensor's own type."""
        data = self.read_bytes(start * self.row_nbytes, stop * self.row_nbytes)
        return data.view(torch_dtype(self.dtype)).reshape(stop - start, *self.shape[1:])


class RowReader(Protocol):
    """A weight whose rows are computed when they are asked for."""

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the first dimension, fp32."""
        ...


class ByteSink(Protocol):
    """Where bytes go: a file, or a comparison with what one holds."""

    def write(self, data: bytes | memoryview, at: int) -> None: ...

    def fileno(self) -> int | None:
        """A file descriptor that the kernel may copy into; None: every byte has to come through `write`."""
        ...


class TensorSource:
    """Named tensors that are read when they are needed, and not before. Thread-safe.

    A new kind of source is a subclass with `tensors`, each of them with this source, and `read_into`.
    """

    tensors: Mapping[str, TensorInfo]

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `start` on. CheckpointError where they cannot be read.

        The default is for sources that only rename or select the tensors of another one.
        """
        assert info.source is not self, f"{type(self).__name__} has to implement read_into"
        info.source.read_into(info, start, into)

    def copy_to(
        self, info: TensorInfo, start: int, stop: int, out: ByteSink, at: int,
        seen: Callable[[int, memoryview], None] | None = None,
    ) -> None:  # fmt: skip
        """Copy bytes [start, stop) of a tensor to `at`. seen: is given the place in the tensor of bytes, and them.

        A source whose bytes the kernel can copy overrides this.
        """
        for done in range(start, stop, STRETCH):
            buffer = memoryview(bytearray(min(STRETCH, stop - done)))
            self.read_into(info, done, buffer)
            out.write(buffer, at + done - start)
            if seen is not None:
                seen(done, buffer)

    def known_hash(self, name: str) -> str | None:
        """The hash of a tensor's bytes (checkpoint/hashing.py), if the source has it; None: it takes reading."""
        return None

    def file_size(self, file: Path) -> int:
        """Bytes of a file that tensors of this source are in."""
        return max(t.end for t in self.tensors.values() if t.file == file)

    def read(self, name: str) -> "torch.Tensor":
        """The whole tensor, in its own type."""
        info = self.tensors[name]
        return info.rows(0, info.height).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the first dimension, in the tensor's own type; a scalar has one."""
        return self.tensors[name].rows(start, stop)

    def read_bytes(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Bytes [start, stop) of a tensor as they are stored, uint8."""
        return self.tensors[name].read_bytes(start, stop)
