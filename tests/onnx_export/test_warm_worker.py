"""The engines' process: started before it is needed, killed whatever it does, and never left behind."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_export.errors import ExportError
from lora_export.onnx_export.engines import isolated
from lora_export.onnx_export.engines.isolated import Worker
from tests import warm_engines

REQUESTS, SLOW = "tests.onnx_export.requests", "tests.onnx_export.slow_import"
PATIENCE = 20  # seconds, for a machine that has other things to do


@pytest.fixture(autouse=True)
def as_users_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_start", warm_engines.STARTED)


def ask(worker: Worker, begun: Path, seconds: float = 0) -> None:
    worker.run(REQUESTS, {"begun": str(begun), "seconds": seconds}, engine="none")


def until(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def process_of(worker: Worker) -> psutil.Process:
    assert worker._process is not None
    return psutil.Process(worker._process.pid)


def asking(worker: Worker, begun: Path) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that waits for a request which takes a minute, and what came of it."""
    ends: list[BaseException] = []

    def run() -> None:
        try:
            ask(worker, begun, 60)
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ends


def test_warm_imports_before_the_first_request(tmp_path: Path) -> None:
    with Worker() as worker:
        worker.warm("no.such.module", REQUESTS)
        ask(worker, tmp_path / "a")
        assert (tmp_path / "a.warm").exists()
        process = process_of(worker)
        ask(worker, tmp_path / "b")
        assert process_of(worker).pid == process.pid and (tmp_path / "b.done").exists()
    assert not process.is_running()


def test_warm_then_close_does_not_wait_for_imports() -> None:
    with Worker() as worker:
        worker.warm(SLOW)
        process, started = process_of(worker), time.monotonic()
    assert time.monotonic() - started < 5 and not process.is_running()


def test_cool_ends_what_was_warmed_in_vain_and_nothing_else(tmp_path: Path) -> None:
    with Worker() as worker:
        worker.warm(SLOW)
        process, started = process_of(worker), time.monotonic()
        worker.cool()
        assert time.monotonic() - started < 5 and not process.is_running()
        ask(worker, tmp_path / "a")
        process = process_of(worker)
        worker.cool()
        ask(worker, tmp_path / "b")
        assert process_of(worker).pid == process.pid and not (tmp_path / "b.warm").exists()


@pytest.mark.parametrize("phase", ["warming", "asked", "idle", "not started"])
def test_kill_ends_the_process_and_every_later_request(tmp_path: Path, phase: str) -> None:
    with Worker() as worker:
        if phase == "warming":
            worker.warm(SLOW)
        if phase == "idle":
            ask(worker, tmp_path / "idle")
        process = process_of(worker) if worker._process else None
        if phase in ("warming", "asked"):
            thread, ends = asking(worker, tmp_path / "begun")
            if phase == "asked":
                until(tmp_path / "begun")
                process = process_of(worker)
            else:
                time.sleep(0.1)
            worker.kill()
            thread.join(PATIENCE)
            assert [type(e) for e in ends] == [CancelledError]
        worker.kill()
        with pytest.raises(CancelledError):
            ask(worker, tmp_path / "later")
        assert process is None or process.wait(PATIENCE) is not None or not process.is_running()
    assert not (tmp_path / "begun.done").exists() and not (tmp_path / "later").exists()


def test_process_killed_from_outside_is_told_and_replaced(tmp_path: Path) -> None:
    with Worker() as worker:
        thread, ends = asking(worker, tmp_path / "begun")
        until(tmp_path / "begun")
        process_of(worker).kill()
        thread.join(PATIENCE)
        (error,) = ends
        assert isinstance(error, ExportError) and "status -9" in error.found
        ask(worker, tmp_path / "again")
        assert (tmp_path / "again.done").exists()


def test_end_of_this_process_ends_the_other_one(tmp_path: Path) -> None:
    """Its requests come through a pipe, which breaks when this process dies, even by SIGKILL."""
    program = (
        "import sys, time; from lora_export.onnx_export.engines.isolated import Worker;"
        "w = Worker(); w.warm(); print(w._process.pid, flush=True); time.sleep(60)"
    )
    words, env = [sys.executable, "-c", program], {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        child: Any = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert child.wait(PATIENCE) is None
