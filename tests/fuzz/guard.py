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
_CHECKED = str(Path(tempfile.gettempdir()) / "lora-export-check-")  # where onnx_export.checks puts its copy

_opened: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes)):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


class Hang(Exception):
    """The call took too long."""


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
    allowed = (str(folder.resolve()), str(folder), _CHECKED, *_LIBRARIES)
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
def _soon() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS:g} s")

    earlier = signal.signal(signal.SIGPROF, stop)  # not SIGALRM, which is pytest-timeout's
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
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
