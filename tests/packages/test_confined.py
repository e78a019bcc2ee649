"""The process in which a package's runtime runs: no network, no secrets, limits, and nothing left behind."""

import socket
import sys
import time
from pathlib import Path

import pytest

from lora_export.errors import InputError
from lora_export.workflows import confined

PYTHON = [sys.executable, "-"]
AMPLE = 2**32


def test_confined_program_reads_input_and_answers(tmp_path: Path) -> None:
    done = confined.run(PYTHON, "import os, sys; print(os.getcwd()); sys.exit(3)", tmp_path, memory=AMPLE)
    assert (done.code, done.stdout.strip()) == (3, str(tmp_path.resolve()))


def test_confined_program_reaches_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        done = confined.run(PYTHON, program, tmp_path, memory=AMPLE)
        if done.network != "none":
            pytest.skip(f"no network namespace here: {done.network}")
        assert done.code == 1 and "Error" in done.stderr


def test_confined_program_without_namespace_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        confined, "_LAUNCHER", confined._LAUNCHER.replace("NET, USER = 0x40000000", "NET, USER = 0x7")
    )
    done = confined.run(PYTHON, "import os; print(os.environ['HF_HUB_OFFLINE'])", tmp_path, memory=AMPLE)
    assert (done.code, done.stdout.strip()) == (0, "1") and "no network namespace" in done.network


def test_confined_program_memory_is_limited(tmp_path: Path) -> None:
    program = "import sys; x = bytearray(600 * 2**20); print(len(x))"
    assert confined.run(PYTHON, program, tmp_path, memory=AMPLE).code == 0
    done = confined.run(PYTHON, program, tmp_path, memory=2**29)
    assert done.code == 1 and "MemoryError" in done.stderr


def test_confined_program_and_children_are_killed_at_timeout(tmp_path: Path) -> None:
    child = "import time, pathlib; time.sleep(4); pathlib.Path('late').touch()"
    program = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    started = time.monotonic()
    done = confined.run(PYTHON, program, tmp_path, memory=AMPLE, seconds=2)
    assert done.code is None and time.monotonic() - started < 20
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_confined_program_output_is_limited(tmp_path: Path) -> None:
    monkey = "import sys\nwhile True: sys.stdout.write('x' * 2**20)"
    confined_file = confined._LARGEST_FILE
    try:
        confined._LARGEST_FILE = 2**22
        done = confined.run(PYTHON, monkey, tmp_path, memory=AMPLE)
    finally:
        confined._LARGEST_FILE = confined_file
    assert done.code not in (0, None) and len(done.stdout) <= 2**20


def test_confined_program_gets_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "secret")
    done = confined.run(PYTHON, "import os; print('secret' in os.environ.values())", tmp_path, memory=AMPLE)
    assert done.stdout.strip() == "False"


def test_confined_program_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be started"):
        confined.run(["/nothing/here"], "", tmp_path, memory=AMPLE)
