"""Tensors in files, read by byte range."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.contracts import ByteSink, TensorInfo, TensorSource
from lora_export.contracts.tensors import STRETCH
from lora_export.errors import CheckpointError
from lora_export.storage.disk import copy_range


@dataclass(frozen=True)
class TensorFiles(TensorSource):
    """Tensors of one or several files, which are only ever opened for reading.

    hashes: of tensors that this process has just hashed; follow: whether a file may be a symbolic link.
    """

    tensors: Mapping[str, TensorInfo]
    hashes: Mapping[str, str] = field(default_factory=dict)
    follow: bool = True

    def known_hash(self, name: str) -> str | None:
        return self.hashes.get(name)

    def file_size(self, file: Path) -> int:
        return file.stat().st_size

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        fd = self._open(info)
        try:
            _fill(fd, info, start, into)
        finally:
            os.close(fd)

    def copy_to(
        self, info: TensorInfo, start: int, stop: int, out: ByteSink, at: int,
        seen: Callable[[int, memoryview], None] | None = None,
    ) -> None:  # fmt: skip
        fd, target = self._open(info), out.fileno()
        try:
            if seen and target is not None and os.fstat(fd).st_dev != os.fstat(target).st_dev:
                target = None  # the kernel could only read and write, as happens here
            needed = min(STRETCH, stop - start) if seen or target is None else 0
            buffer = memoryview(bytearray(needed))
            for done in range(start, stop, STRETCH):
                length = min(STRETCH, stop - done)
                if target is not None:
                    _copy(fd, info, done, length, target, at + done - start, out)
                if buffer:  # the bytes are still in the processor's cache
                    _fill(fd, info, done, buffer[:length])
                if target is None:
                    out.write(buffer[:length], at + done - start)
                if seen is not None:
                    seen(done, buffer[:length])
        finally:
            os.close(fd)

    def _open(self, info: TensorInfo) -> int:
        try:
            return os.open(info.file, os.O_RDONLY | (0 if self.follow else os.O_NOFOLLOW))
        except OSError as error:
            raise _unreadable(info, error) from None


def _fill(fd: int, info: TensorInfo, start: int, into: memoryview) -> None:
    at = info.start + start
    try:
        while into:
            done = os.preadv(fd, [into], at)
            if not done:
                raise _ended_early(info)
            into, at = into[done:], at + done
    except OSError as error:
        raise _unreadable(info, error) from None


def _copy(fd: int, info: TensorInfo, start: int, length: int, target: int, at: int, out: ByteSink) -> None:
    try:
        copy_range(fd, info.start + start, length, target, at)
    except EOFError:
        raise _ended_early(info) from None
    except OSError as error:  # the kernel does not say which of the two it was
        error.filename, error.filename2 = str(info.file), str(getattr(out, "path", ""))
        raise


def _ended_early(info: TensorInfo) -> CheckpointError:
    return CheckpointError("the file ended early", where=info.file, tensor=info.name)


def _unreadable(info: TensorInfo, error: OSError) -> CheckpointError:
    return CheckpointError(f"the file cannot be read: {error.strerror}", where=info.file, tensor=info.name)


FILES = TensorFiles({})  # reads whatever tensor of a file it is given
