"""Signals and other processes: whatever arrives, and whenever, nothing is left half done."""

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lora_export import merging
from lora_export.checkpoint import companions
from lora_export.storage import disk, files, interrupts, locks, scratch
from lora_export.storage.files import output_folder
from lora_export.storage.interrupts import Interrupts
from tests.daily import later
from tests.failures.commands import Forked, everything, invoke, merge_words, slow_down, until

PHASES = {
    "copying": "lora_export.checkpoint.tensor_files.copy_range",
    "computing": "lora_export.merging.running.tensor.TensorWork.compute",
    "companions": "lora_export.checkpoint.companions.copy",
    "certificate": "lora_export.merging.write_certificate",
    "syncing": "os.fsync",
}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PROMISED = 1  # seconds from a signal to the end
MARGIN = 5  # for a machine that has other things to do


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("exists", [False, True])
def test_interrupt_exits_with_130_and_leaves_nothing(
    work: Path, tmp_path: Path, number: signal.Signals, phase: str, exists: bool
) -> None:
    if exists:
        (work / "out").mkdir()
        (work / "out" / "mine.txt").write_text("of the user")
    before = everything(work)
    words = merge_words(work, "--force", *(["--json"] if number == signal.SIGTERM else []))
    child = Forked.start(tmp_path / "log", *words, before=partial(slow_down, 0.4, tmp_path / "now", PHASES[phase]))
    until(tmp_path / "now")
    sent = time.monotonic()
    os.kill(child.pid, number)
    assert child.wait() == 130, child.said()
    assert time.monotonic() - sent < PROMISED + MARGIN
    assert "interrupted" in child.said() and "Traceback" not in child.said()
    assert everything(work) == before


def test_interrupt_twice_changes_nothing(work: Path, tmp_path: Path) -> None:
    before = everything(work)
    slowly = partial(slow_down, 0.4, tmp_path / "now")
    child = Forked.start(tmp_path / "log", *merge_words(work), before=slowly)
    until(tmp_path / "now")
    while child.process.exitcode is None:
        for number in SIGNALS:
            with contextlib.suppress(ProcessLookupError):  # it may have ended since it was asked
                os.kill(child.pid, number)
        time.sleep(0.002)
    assert child.wait() == 130, child.said()
    assert child.said().count("interrupted") == 1 and "Traceback" not in child.said(), child.said()
    assert everything(work) == before


def test_interrupt_before_command_exits_with_130(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def talking(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_export.commands.derive.talking", talking)
    result = invoke(*merge_words(work))
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted\n" and result.stdout == ""


class AtLine:
    """Sends SIGINT to this process when it comes to the nth line of the code that puts an output in its place."""

    FILES = frozenset(
        str(module.__file__) for module in (disk, files, interrupts, locks, merging, scratch, companions)
    )

    def __init__(self, nth: int) -> None:
        self.nth, self.seen, self.where = nth, 0, ""
        self.before = sys.gettrace()  # coverage's, while it is measured

    def __enter__(self) -> "AtLine":
        sys.settrace(lambda frame, event, value: self._line if frame.f_code.co_filename in self.FILES else None)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _line(self, frame: FrameType, event: str, value: object) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.nth:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._line


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, even if the tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exists", [later(False), True])
def test_interrupt_at_every_line_leaves_old_or_new_state(
    work: Path, monkeypatch: pytest.MonkeyPatch, step: int, exists: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    words = merge_words(work, "--force")

    def restore() -> dict[str, str]:
        shutil.rmtree(work / "out", ignore_errors=True)
        if exists:
            (work / "out").mkdir()
            (work / "out" / "mine.txt").write_text("of the user")
        return everything(work / "out")

    restore()
    with AtLine(0) as lines:
        assert invoke(*words).exit_code == 0
    new, inputs = everything(work / "out"), everything(work / "base") | everything(work / "adapter")
    assert lines.seen > 300
    for nth in range(1, lines.seen + 1, step):
        old = restore()
        with AtLine(nth) as line:
            result = invoke(*words)
        assert result.exit_code == 130, (nth, line.where, result.output, result.exception)
        names = {p.name for p in work.iterdir()}
        assert names - {"out"} == {"base", "adapter"}, (nth, line.where)
        assert everything(work / "out") in (old, new), (nth, line.where)
        assert exists <= ("out" in names), (nth, line.where)
    assert everything(work / "base") | everything(work / "adapter") == inputs


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exists", [False, True])
def test_kill_at_any_moment_leaves_old_or_new_state(work: Path, tmp_path: Path, exists: bool, kills: int) -> None:
    words, slowly = merge_words(work, "--force"), partial(slow_down, 0.005, tmp_path / "now")
    assert Forked.start(tmp_path / "log", *words, before=slowly).wait() == 0
    started = time.monotonic()
    assert Forked.start(tmp_path / "log", *words, before=slowly).wait() == 0
    whole = time.monotonic() - started
    new, before = everything(work / "out"), tmp_path / "before"
    before.mkdir()
    if exists:
        (before / "mine.txt").write_text("of the user")
    old, reached, moments = everything(before), set(), random.Random(kills)
    for i in range(kills):
        shutil.rmtree(work / "out", ignore_errors=True)
        if exists:
            shutil.copytree(before, work / "out")
        child = Forked.start(tmp_path / "log", *words, before=slowly)
        time.sleep(whole * moments.uniform(0, 1.1))
        child.process.kill()
        child.wait()
        state = everything(work / "out") if (work / "out").exists() else {}
        assert state in (old, new), f"neither the old state nor the new one after {i}"
        reached.add("new" if state == new else "old")
    assert "old" in reached
    assert Forked.start(tmp_path / "log", *words).wait() == 0
    assert everything(work / "out") == new
    assert {p.name for p in work.iterdir()} == {"base", "adapter", "out"}


def meet(folder: Path, count: int) -> None:
    """For `before`: go on when `count` processes are here, and then slowly."""
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.001)
    slow_down(0.15, folder.with_name("now"))


@pytest.mark.parametrize("count", [2, 5])
def test_concurrent_merges_have_one_winner(work: Path, tmp_path: Path, count: int) -> None:
    together = partial(meet, tmp_path / "here", count)
    force: list[list[str]] = [[], ["--force"]]
    children = [
        Forked.start(tmp_path / f"log{i}", *merge_words(work, *force[i % 2]), before=together) for i in range(count)
    ]
    codes = [child.wait() for child in children]
    assert sorted(codes) == [0] + [1] * (count - 1), [child.said() for child in children]
    winner = children[codes.index(0)]
    for loser in children:
        said = f"another process (PID {winner.pid}) is writing this output"
        assert loser is winner or said in loser.said(), loser.said()
    assert {p.name for p in work.iterdir()} == {"base", "adapter", "out"}


# --- Interrupts by itself ----------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Signals arrive in this list."""
    numbers: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: numbers.append(number)) for n in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_held_signals_wait_unless_allowed(heard: list[int], number: signal.Signals) -> None:
    with Interrupts() as guarded:
        signal.raise_signal(number)
        assert heard == []
        with guarded.welcome():
            assert heard == [number]
            signal.raise_signal(number)
            assert heard == [number] * 2
        signal.raise_signal(number)
        assert heard == [number] * 2
    assert heard == [number] * 3


def test_held_signals_are_dropped_after_failure(heard: list[int]) -> None:
    with pytest.raises(RuntimeError), Interrupts():
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError
    assert heard == []
    signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGINT]


def test_second_signal_waits_for_cleanup() -> None:
    cleaned = False
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupts() as guarded:
            try:
                with guarded.welcome():
                    signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned = True
        assert cleaned
    finally:
        signal.signal(signal.SIGINT, before)


def test_output_in_thread_leaves_signals_alone(tmp_path: Path) -> None:
    def write() -> None:
        with output_folder(tmp_path / "out", False) as stage:
            (stage / "file").write_text("x")

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert (tmp_path / "out" / "file").exists()
    assert signal.getsignal(signal.SIGINT) is before
