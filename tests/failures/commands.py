"""Running the command line: in this process, in a forked child that real signals reach, or as a program."""

import hashlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lora_export.commands.main import cli


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def merge_words(work: Path, *more: object) -> list[object]:
    """The command that merges work/adapter into work/base."""
    return ["merge", "-b", work / "base", "-a", work / "adapter", "-o", work / "out", *more]


def everything(folder: Path) -> dict[str, str]:
    """Every path below `folder`, hidden ones too, with its content's hash."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


# Children are forked from a process that has imported everything and computed nothing: MKL's threads do not
# survive a fork. Every third child of a process that had merged before it forked ran for ever.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "lora_export.merging", "tests.failures.faults", "tests.failures.commands"])


@dataclass
class Forked:
    """A child that runs the command, after what `before` does in it. Real signals reach it; it costs no imports."""

    process: Any
    log: Path

    @classmethod
    def start(cls, log: Path, *arguments: object, before: Callable[[], object] | None = None) -> "Forked":
        child = _FORKS.Process(target=_run, args=(log, [str(a) for a in arguments], before))
        child.start()
        return cls(child, log)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def wait(self, seconds: float = 60) -> int:
        """The exit code; minus the signal's number where one killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the command did not end within {seconds} s: {self.said()}")
        return int(self.process.exitcode)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def _run(log: Path, arguments: list[str], before: Callable[[], object] | None) -> None:
    # A shell that runs the tests in the background has them ignore it, and nohup the other.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if before is not None:
        before()
    cli(arguments, prog_name="lora-export")


def slow_down(seconds: float, mark: Path, name: str = "lora_export.checkpoint.tensor_files.copy_range") -> None:
    """For `before`: every call of a function takes that long, and the first one makes the file `mark`."""
    real = pkgutil.resolve_name(name)

    def slowly(*arguments: Any, **more: Any) -> Any:
        mark.touch()
        time.sleep(seconds)
        return real(*arguments, **more)

    pytest.MonkeyPatch().setattr(name, slowly)


def until(path: Path, seconds: float = 60) -> None:
    """Wait for a file that another process makes."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)
