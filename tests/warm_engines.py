"""Engines' processes for tests: each is forked from one that has imported what engines import, which takes 5 s.

A forked process is as new as a started one: its environment, folder, pipes and status are its own, and it knows
nothing of other exports. `Front.start` stands in for `isolated._start` (tests/conftest.py). Slow tests start the
processes as users do; so do all tests while coverage is measured, and where the system is not Linux.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from lora_export.onnx_export.engines import isolated, worker_process

_IMPORTS = (
    "onnxruntime_genai.models.builder", "torch.onnx._internal.exporter._core", "transformers.modeling_utils",
    "lora_export.onnx_export.engines.genai_process", "lora_export.onnx_export.engines.dynamo_process",
    "lora_export.onnx_export.engines.dynamo_passes.passes", "lora_export.onnx_export.engines.dynamo_passes.tracing",
    "lora_export.onnx_export.engines.building", "lora_export.validation.proof.process",
)  # fmt: skip


class Forked:
    """What `isolated.Worker` uses of a Popen."""

    def __init__(self, stdin: int, stdout: int, told: socket.socket) -> None:
        self.stdin, self.stdout = os.fdopen(stdin, "wb", buffering=0), os.fdopen(stdout, "rb")
        self._told = told
        self._status: int | None = None
        self.pid = self._number()

    def wait(self, timeout: float | None = None) -> int:
        if self._status is None:
            self._told.settimeout(timeout)
            try:
                self._status = self._number()
            except TimeoutError:
                raise subprocess.TimeoutExpired("an engine's process", timeout or 0) from None
            self._told.close()
        return self._status

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _number(self) -> int:
        told = self._told.recv(4)
        assert len(told) == 4, "the process that engines' processes are forked from has ended"
        return int.from_bytes(told, "little", signed=True)


class Front:
    """The process that the others are forked from. It starts with the first request and ends with this process."""

    def __init__(self) -> None:
        self._asked: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, scratch: str, *modules: str) -> Forked:
        """As `isolated._start`."""
        if self._asked is None:
            self._begin()
        assert self._asked is not None
        message = json.dumps(
            {"folder": scratch, "environment": isolated._environment(scratch), "modules": modules}
        ).encode()
        (read, stdin), (stdout, write), (told, tells) = os.pipe(), os.pipe(), socket.socketpair()
        with Path(scratch, "log.txt").open("ab") as sink, tells:
            socket.send_fds(self._asked, [message], [read, write, sink.fileno(), tells.fileno()])
        os.close(read)
        os.close(write)
        return Forked(stdin, stdout, told)

    def _begin(self) -> None:
        self._asked, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            environment = isolated._environment(os.devnull) | {"PYTHONPATH": str(Path(__file__).parents[1])}
            command = [sys.executable, "-m", "tests.warm_engines", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()]
            )


STARTED = isolated._start  # as users do
FRONT = Front()


def _serve(asked: socket.socket) -> None:
    """Fork for each request, until the one who asks is gone."""
    while True:
        message, handles, _, _ = socket.recv_fds(asked, 2**20, 4)
        if not message:
            return
        if os.fork() == 0:
            asked.close()
            _watch(json.loads(message), *handles)
            os._exit(0)
        for handle in handles:
            os.close(handle)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(message: dict[str, Any], stdin: int, stdout: int, stderr: int, tells: int) -> None:
    """Start the process, and tell its number and, when it has ended, its status."""
    if (pid := os.fork()) == 0:
        os.close(tells)
        for ours, theirs in enumerate((stdin, stdout, stderr)):
            os.dup2(theirs, ours)
            os.close(theirs)
        os.chdir(message["folder"])
        os.environ.clear()
        os.environ.update(message["environment"])
        sys.argv[1:] = message["modules"]
        status = 1
        try:
            worker_process.main()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)
    for handle in (stdin, stdout, stderr):
        os.close(handle)
    os.write(tells, _bytes(pid))
    os.write(tells, _bytes(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def _bytes(number: int) -> bytes:
    return number.to_bytes(4, "little", signed=True)


if __name__ == "__main__":
    gc.disable()
    for name in _IMPORTS:
        importlib.import_module(name)
    logging.root.handlers.clear()  # the builder of genai has opened it
    logging.root.setLevel(logging.WARNING)
    gc.freeze()  # or the first collection in each forked process would touch, and so copy, all of this one's memory
    _serve(socket.socket(fileno=int(sys.argv[1])))
