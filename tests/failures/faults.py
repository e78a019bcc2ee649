"""Every call that changes or reads what is on disk, counted; the one that a test chooses fails, or kills."""

import builtins
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_export.storage import disk

WRITES = (
    "pwrite", "pwritev", "write", "writev", "copy_file_range", "sendfile", "mkdir", "replace", "rename", "link",
    "symlink", "truncate", "ftruncate", "fsync", "fdatasync",
)  # fmt: skip
REMOVALS = ("unlink", "rmdir")
READS = ("pread", "preadv", "copy_file_range", "sendfile")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Faults:
    """Counts calls of `names`, and what Python's own file objects do with files below `folder` in their `mode`.

    `seen` holds the name of every call so far. `arm` has the nth from now on run an action before it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, names: tuple[str, ...], mode: str) -> None:
        self.seen: list[str] = []
        self._nth, self._action = 0, _nothing
        self._folder, self._mode = str(folder), mode
        self._counting = threading.Lock()
        for name in names:
            # Only a power cut shows whether fsync did anything, and on a busy disk it takes its time.
            real = _nothing if name.endswith("sync") else getattr(os, name)
            monkeypatch.setattr(os, name, self._counted(name, real))
        self._real_os_open, self._real_open = os.open, io.open
        if mode == "w":
            monkeypatch.setattr(os, "open", self._os_open)
            monkeypatch.setattr(disk, "exchange_names", self._counted("renameat2", disk.exchange_names))
        monkeypatch.setattr(io, "open", self._open)
        monkeypatch.setattr(builtins, "open", self._open)

    @classmethod
    def of_writing(cls, monkeypatch: pytest.MonkeyPatch, folder: Path) -> "Faults":
        return cls(monkeypatch, folder, WRITES, "w")

    @classmethod
    def of_writing_and_removing(cls, monkeypatch: pytest.MonkeyPatch, folder: Path) -> "Faults":
        return cls(monkeypatch, folder, WRITES + REMOVALS, "w")

    @classmethod
    def of_reading(cls, monkeypatch: pytest.MonkeyPatch, folder: Path) -> "Faults":
        return cls(monkeypatch, folder, READS, "r")

    def arm(self, nth: int, action: Callable[[], None]) -> None:
        self.seen.clear()
        self._nth, self._action = nth, action

    def disarm(self) -> None:
        self.arm(0, _nothing)

    def call(self, name: str) -> None:
        with self._counting:
            self.seen.append(name)
            now = len(self.seen) == self._nth
        if now:
            self._action()

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            if name != "mkdir" or not Path(arguments[0]).is_dir():  # else it changes nothing
                self.call(name)
            return real(*arguments, **more)

        return counted

    def _ours(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)

    def _os_open(self, path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if flags & _WRITING and self._ours(path):
            self.call("open")
        return self._real_os_open(path, flags, *arguments, **more)

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *words: Any, **more: Any) -> Any:
        """Python's open() calls the system from C; here the calls of its lowest layer are counted."""
        if not self._ours(file) or ("r" in mode) != (self._mode == "r"):
            return self._real_open(file, mode, buffering, *words, **more)
        self.call("open")
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = io.BufferedReader(raw) if self._mode == "r" else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *words, **more)


class _Raw(io.FileIO):
    def __init__(self, faults: Faults, file: Any, mode: str) -> None:
        self._faults = faults
        super().__init__(file, mode)

    def write(self, data: Any) -> int:
        self._faults.call("write")
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self._faults.call("read")
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._faults.call("read")
        return super().readall()


def _nothing(*_: object) -> None: ...


def failing(number: int) -> Callable[[], None]:
    """An action: the error that a system call would end with."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def kill_at(nth: int, folder: Path) -> None:
    """For `Forked`: the process dies before the nth call that writes or removes something."""
    faults = Faults.of_writing_and_removing(pytest.MonkeyPatch(), folder)
    faults.arm(nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
