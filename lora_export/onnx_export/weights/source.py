"""Where the numbers of an export come from: a checkpoint's files, or a merge that computes them when asked."""

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from lora_export.checkpoint.hashing import hash_tensor
from lora_export.contracts import TensorInfo
from lora_export.errors import CheckpointError

if TYPE_CHECKING:
    from lora_export.onnx_export.weights.dtypes import Array


class WeightSource(Protocol):
    """Named tensors, known by their headers. `rows`: rows [start, stop) of the first dimension in the tensor's own
    type, from any thread; a scalar has one. `hash`: of a tensor's bytes, as the certificate has it."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def rows(self, name: str, start: int, stop: int) -> "Array": ...

    def hash(self, name: str) -> str: ...


class FileSource:
    """The tensors of safetensors files, each file opened once."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._files: dict[str, int] = {}
        self._opening = threading.Lock()

    def rows(self, name: str, start: int, stop: int) -> "Array":
        import numpy as np

        from lora_export.onnx_export.weights.dtypes import STORED

        info = self.tensors[name]
        if info.dtype not in STORED:
            raise CheckpointError(
                f"weights of type {info.dtype} cannot be exported",
                where=info.file,
                tensor=name,
                expected=", ".join(STORED),
                next_step="lora-export merge -b BASE -a ADAPTER -o OUT, then export OUT",
            )
        shape = info.shape or (1,)
        row = info.nbytes // shape[0] if shape[0] else 0
        data = np.empty((stop - start) * row, np.uint8)
        self._read(info, info.start + start * row, data.data)
        return data.view(STORED[info.dtype]).reshape(stop - start, *shape[1:])

    def hash(self, name: str) -> str:
        return hash_tensor(self.tensors[name])

    def _read(self, info: TensorInfo, at: int, into: memoryview) -> None:
        fd = self._open(info)
        try:
            while into:
                done = os.preadv(fd, [into], at)
                if not done:
                    raise CheckpointError("the file ended early", where=info.file, tensor=info.name)
                into, at = into[done:], at + done
        except OSError as error:
            text = f"the file cannot be read: {error.strerror}"
            raise CheckpointError(text, where=info.file, tensor=info.name) from None

    def _open(self, info: TensorInfo) -> int:
        with self._opening:
            path = str(info.file)
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    text = f"the file cannot be read: {error.strerror}"
                    raise CheckpointError(text, where=info.file, tensor=info.name) from None
            return self._files[path]

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
