"""What must hold for any input: a sound result or a refusal in words, soon, in little memory, from one folder."""

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings

from lora_export.errors import LoraExportError

T = TypeVar("T")
SECONDS = 5.0  # of the processor: a busy machine is no hang
MEMORY = 2**30  # bytes that one call may take, for inputs of a few kilobytes
LONGEST = 12_000  # characters of a refusal
_LIBRARIES = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc", "/sys", "/usr", "/dev"})
_SCRATCH = str(Path(tempfile.gettempdir()) / "lora-export-")  # where a changed copy is put, for a library to read

_opened: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes)):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


class Hang(Exception):
    """The call took too long."""


@dataclass
class Worst:
    """What inputs have cost so far at most. seconds, megabytes: beyond what any input may take, of one call; rate:
    seconds of the processor for each MB of an input of a MB or more."""

    seconds: float = 0.0
    rate: float = 0.0
    memory: int = 0


WORST = Worst()
FLOOR = 1.0  # seconds that any input may take
EXPANSION, ROOM = 10, 100 * 2**20  # memory: times the input, and bytes besides


@contextlib.contextmanager
def measured(size: int) -> Iterator[None]:
    """Inside, an input of `size` bytes takes a second for each MB, and 10 times its size and 100 MB of memory."""
    before = _restart_peak()
    started = time.process_time()
    try:
        with _soon(max(SECONDS, FLOOR + 2 * size / 1e6)):
            yield
    finally:
        seconds, memory = time.process_time() - started, _peak() - before
        WORST.seconds, WORST.memory = max(WORST.seconds, seconds), max(WORST.memory, memory)
        if size >= 1_000_000:
            WORST.rate = max(WORST.rate, seconds / (size / 1e6))
    assert seconds < FLOOR + size / 1e6, f"{seconds:.1f} s for {size} bytes"
    assert memory < EXPANSION * size + ROOM, f"{memory} bytes of memory for {size}"


def _restart_peak() -> int:
    """Bytes of this process in memory now; from here on its peak counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux
        return 0
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def attempt(folder: Path, call: Callable[[], T]) -> T | LoraExportError:
    """The call's result, or its refusal. Everything else that can go wrong fails the test."""
    global _opened
    started = time.process_time()
    with _little_memory(), _soon():
        _opened = []
        try:
            outcome: T | LoraExportError = call()
        except LoraExportError as refusal:
            outcome = refusal
        finally:
            opened, _opened = _opened, None
    assert time.process_time() - started < SECONDS, "it hung where no signal reaches"
    allowed = (str(folder.resolve()), str(folder), _SCRATCH, *_LIBRARIES)
    outside = [path for path in opened if not os.path.abspath(path).startswith(allowed)]  # noqa: PTH100
    assert not outside, f"opened outside the folder: {outside}"
    if isinstance(outcome, LoraExportError):
        _check_words(outcome)
    return outcome


def _check_words(refusal: LoraExportError) -> None:
    assert refusal.found.strip(), "a refusal without words"
    parts = [v for v in refusal.as_json().values() if v]
    assert all(c.isprintable() for text in parts for c in text), f"control characters in {parts}"
    assert len(refusal.message()) < LONGEST, "a refusal that fills the screen"


@contextlib.contextmanager
def _soon(seconds: float = SECONDS) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s")

    earlier = signal.signal(signal.SIGPROF, stop)  # not SIGALRM, which is pytest-timeout's
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- harnesses ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Harness:
    """A property and what it is tried on; `tools/fuzz.py` tries it for as long as one likes."""

    name: str
    check: Callable[..., None]
    strategies: dict[str, Any]


HARNESSES: list[Harness] = []


def harness(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An ordinary test of a few examples, known to tools/fuzz.py under its name without `test_`."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        HARNESSES.append(Harness(check.__name__.removeprefix("test_"), check, strategies))
        few = settings(
            max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        test: Callable[..., None] = few(given(**strategies)(check))
        return test

    return decorate
