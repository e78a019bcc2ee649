"""The machine that every layout runs on: jobs that put bytes into a sink, on all cores, within a memory limit."""

import contextlib
import ctypes
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lora_export.contracts.tensors import ByteSink, TensorInfo
from lora_export.storage.disk import start_writing_back, write_at

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

T = TypeVar("T")

BLOCK = 2**22  # bytes of fp32 in a block: small enough for the caches, large enough to be worth a call
PIECE = 2**24  # bytes that a thread copies before it takes something else
PATIENCE = 0.1  # seconds between two looks at the threads, and so what Ctrl-C may have to wait
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


# --- sinks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenFile:
    """A file that is written, or read, at any position.

    turn: writes to one file take turns in the kernel, which has a core wait for it; here the thread sleeps.
    """

    path: Path
    fd: int
    turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def create(cls, path: Path) -> "OpenFile":
        """A new file. OSError where there is one."""
        return cls(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))

    def close(self) -> None:
        os.close(self.fd)

    def resize(self, nbytes: int) -> None:
        os.truncate(self.fd, nbytes)

    def fileno(self) -> int | None:
        return self.fd

    def write(self, data: bytes | memoryview, at: int) -> None:
        self.write_lines(data, len(data), at, len(data))

    def write_lines(self, data: bytes | memoryview, length: int, at: int, apart: int) -> None:
        """`data` in lines of `length` bytes, the first to `at`, each next one `apart` bytes further on."""
        if length == apart:
            length = len(data)
        starts = range(0, len(data), max(1, length))
        try:
            with self.turn:
                for i, start in enumerate(starts):
                    write_at(self.fd, data[start : start + length], at + i * apart)
        except OSError as error:
            error.filename = str(self.path)
            raise
        start_writing_back(self.fd, at, max(len(data), apart * len(starts)))


@dataclass(frozen=True)
class ComparedFile(OpenFile):
    """A file that is only read: what would be written is compared with what is there.

    differs: gets the place of each write of which a byte differs, the bytes that belong there, and those that are
    there (fewer where the file ends).
    """

    differs: Callable[[int, "Bytes", "Bytes"], None] = field(kw_only=True)

    @classmethod
    def compare(
        cls, path: Path, differs: Callable[[int, "Bytes", "Bytes"], None], flags: int = 0
    ) -> "ComparedFile":
        """flags: of `os.open`, besides O_RDONLY."""
        return cls(path, os.open(path, os.O_RDONLY | flags), differs=differs)

    def fileno(self) -> int | None:
        return None

    def write_lines(self, data: bytes | memoryview, length: int, at: int, apart: int) -> None:
        import numpy as np

        for i, start in enumerate(range(0, len(data), max(1, length))):
            wanted = np.frombuffer(data, np.uint8)[start : start + length]
            there = self._read(at + i * apart, len(wanted))
            if len(there) < len(wanted) or not np.array_equal(wanted, there):
                self.differs(at + i * apart, wanted, there)

    def _read(self, at: int, length: int) -> "Bytes":
        """The bytes of the file from `at` on, fewer where it ends. OSError names the file."""
        import numpy as np

        data, done = np.empty(length, np.uint8), 0
        try:
            while done < length and (got := os.preadv(self.fd, [data[done:].data], at + done)):
                done += got
        except OSError as error:
            error.filename = str(self.path)
            raise
        return data[:done]


class Regions(Generic[T]):
    """What lies where in files: (file, offset, what), each up to the next one."""

    def __init__(self, regions: Iterable[tuple[str, int, T]]) -> None:
        self._starts: dict[str, list[tuple[int, T]]] = {}
        for file, offset, what in sorted(regions, key=lambda r: r[:2]):
            self._starts.setdefault(file, []).append((offset, what))

    def at(self, file: str, offset: int) -> T | None:
        """None before the first one."""
        starts = self._starts[file]
        index = bisect_right(starts, offset, key=lambda one: one[0]) - 1
        return starts[index][1] if index >= 0 else None


# --- jobs --------------------------------------------------------------------------------------------------


def nothing() -> None:
    """What is left to do after most jobs."""


@dataclass(frozen=True)
class Job:
    """run: puts bytes into a sink, and returns how many; cost: bytes of memory that it takes meanwhile.

    done: called afterwards, when that memory is free again.
    """

    run: Callable[[], int]
    cost: int = 0
    done: Callable[[], None] = nothing


def copies(
    info: TensorInfo, out: ByteSink, at: int,
    seen: Callable[[int, memoryview], None] | None = None, done: Callable[[], None] = nothing,
) -> Iterator[Job]:  # fmt: skip
    """Jobs that copy a tensor as it is stored to `at`; `seen` and `done` as in `copy_to` and in Job."""

    def copy(start: int, stop: int) -> int:
        info.source.copy_to(info, start, stop, out, at + start, seen)
        target = out.fileno()
        if target is not None:
            start_writing_back(target, at + start, stop - start)
        return stop - start

    for start in range(0, info.nbytes, PIECE):
        yield Job(partial(copy, start, min(start + PIECE, info.nbytes)), done=done)


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


def carry_out(
    jobs: Iterable[Job],
    budget: Budget | None = None,
    workers: int | None = None,
    look: Callable[[int], None] = lambda written: None,
) -> None:
    """Run every job, each thread the next one, and within the budget together.

    look: called now and then from this thread, with the bytes that were written. The first error of a job stops all
    threads and is raised. Iterating over `jobs` needs no lock of its own.
    """
    waiting, taking, stopped, written = iter(jobs), threading.Lock(), threading.Event(), 0

    def work() -> None:
        nonlocal written
        while not stopped.is_set():
            with taking:
                job = next(waiting, None)
            if job is None:
                return
            with budget.holding(job.cost) if budget else contextlib.nullcontext():
                count = job.run()
            job.done()
            with taking:
                written += count

    with ThreadPoolExecutor(workers := workers or cores(), "worker") as pool:
        running = {pool.submit(work) for _ in range(workers)}
        try:
            while running:
                done, running = wait(running, PATIENCE, FIRST_EXCEPTION)
                look(written)
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
