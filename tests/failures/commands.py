"""Running the command line: in this process, in a forked child that real signals reach, or as a program."""

import contextlib
import hashlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner, Result

from lora_export.commands.main import cli


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def everything(folder: Path) -> dict[str, str]:
    """Every path below `folder`, hidden ones too, with its content's hash."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


@dataclass
class Forked:
    """A child of this process that runs the command: it inherits what a test has patched, and costs no imports."""

    pid: int
    log: Path

    @classmethod
    def start(cls, log: Path, *arguments: object) -> "Forked":
        pid = os.fork()
        if pid == 0:
            code = 99
            # A shell that runs the tests in the background has them ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(fd, 1)
                os.dup2(fd, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                try:
                    cli([str(a) for a in arguments], prog_name="lora-export")
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 98
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
            finally:
                os._exit(code)
        return cls(pid, log)

    def wait(self) -> int:
        """The exit code; minus the signal's number where one killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        return self.log.read_text()
