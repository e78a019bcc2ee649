"""Jobs shared out over the cores: each thread takes the next one, within a memory limit that they keep together."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.storage.disk import start_writing_back, write_at

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK = 2**22  # bytes of fp32 in a block: small enough for the caches, large enough to be worth a call
PATIENCE = 0.1  # seconds between two looks at the threads, and so what Ctrl-C may have to wait
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class OpenFile:
    """turn: writes to one file take turns in the kernel, which has a core wait for it; here the thread sleeps."""

    path: Path
    fd: int
    turn: threading.Lock = field(default_factory=threading.Lock)

    def write(self, data: bytes | memoryview, at: int) -> None:
        try:
            with self.turn:
                write_at(self.fd, data, at)
        except OSError as error:
            error.filename = str(self.path)
            raise
        start_writing_back(self.fd, at, len(data))

    def write_lines(self, data: memoryview, length: int, at: int, apart: int) -> None:
        """`data` in lines of `length` bytes, the first to `at`, each next one `apart` bytes further on."""
        if length == apart:
            self.write(data, at)
            return
        count = len(data) // length
        try:
            with self.turn:
                for i in range(count):
                    write_at(self.fd, data[i * length : (i + 1) * length], at + i * apart)
        except OSError as error:
            error.filename = str(self.path)
            raise
        start_writing_back(self.fd, at, apart * count)


@dataclass(frozen=True)
class ComparedFile(OpenFile):
    """A file that is only read: what would be written is compared with what is there.

    told: gets the place of each write of which a byte differs, the bytes that belong there, and those that are
    there (fewer where the file ends).
    """

    told: Callable[[int, "Bytes", "Bytes"], None] = field(kw_only=True)

    def write(self, data: bytes | memoryview, at: int) -> None:
        import numpy as np

        wanted = np.frombuffer(data, np.uint8)
        found = read_bytes(self, at, len(wanted))
        if len(found) < len(wanted) or not np.array_equal(wanted, found):
            self.told(at, wanted, found)

    def write_lines(self, data: memoryview, length: int, at: int, apart: int) -> None:
        for i in range(len(data) // length):
            self.write(data[i * length : (i + 1) * length], at + i * apart)


def read_bytes(file: OpenFile, at: int, length: int) -> "Bytes":
    """The bytes of a file from `at` on, fewer where it ends. OSError names the file."""
    import numpy as np

    data = np.empty(length, np.uint8)
    done = 0
    try:
        while done < length:
            got = os.preadv(file.fd, [data[done:].data], at + done)
            if not got:
                break
            done += got
    except OSError as error:
        error.filename = str(file.path)
        raise
    return data[:done]


class Budget:
    """Bytes that may be in use together; whoever would exceed them waits for others to finish."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, cost: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + cost <= self._limit)
            self._used += cost
        try:
            yield
        finally:
            with self._changed:
                self._used -= cost
                self._changed.notify_all()


def share_out(take: Callable[[], bool], workers: int, look: Callable[[], None]) -> None:
    """Call `take`, which does one job, in `workers` threads until it says that there are no more.

    look: called now and then from this thread. The first error of a job stops all threads and is raised.
    """
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set() and take():
            pass

    with ThreadPoolExecutor(workers, "worker") as pool:
        running = {pool.submit(work) for _ in range(workers)}
        try:
            while running:
                done, running = wait(running, PATIENCE, FIRST_EXCEPTION)
                look()
                for finished in done:
                    finished.result()
        finally:
            stopped.set()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reuse_memory() -> None:
    """Have glibc keep what is freed: a block that went back to the system costs its page faults anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 8 * BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 64 * BLOCK)
