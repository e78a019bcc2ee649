"""Runs engines in a separate process: its memory is freed, its output goes to a log, and its crashes stay there."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Self

from lora_export.errors import AdapterError, CheckpointError, ExportError, InputError, LoraExportError

LAST_LINES = 12
_KEPT = frozenset({"PATH", "HOME", "USER", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LANG", "VIRTUAL_ENV"})
_KEPT_PREFIXES = ("LC_", "LD_LIBRARY", "DYLD_", "CUDA", "NVIDIA", "OMP_", "MKL_", "KMP_")
_LOGGED = re.compile(r"[IWE]\d{4} ")  # torch's log
_PROCESS = "lora_export.onnx_export.engines.worker_process"


class Worker:
    """A process that runs modules of this package, one request after another, and imports torch only once.

    It starts with `warm` or its first request, in an empty folder, offline, and without the tokens and proxies of
    this environment. As a context manager it ends with the block.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lora-export-")
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = self._killed = False
        self._starting = threading.Lock()

    def warm(self, *modules: str) -> None:
        """Start the process, which imports `modules` while nobody waits for it."""
        self._process = self._process or _start(self._folder.name, *modules)

    def run(self, module: str, request: Mapping[str, Any], *, engine: str, task: str = "") -> None:
        """Call `main(request)` of the module `module` there; ExportError with the last lines if it fails.

        A refusal in this package's own words arrives as it is. task: what failed then, if not the engine itself.
        CancelledError after `kill`.
        """
        scratch = self._folder.name
        log = Path(scratch, "log.txt")
        log.write_bytes(b"")
        with self._starting:
            if self._killed:
                raise CancelledError
            process = self._process = self._process or _start(scratch)
            self._asked = True
        assert process.stdin is not None and process.stdout is not None
        message = {"module": module, "request": {**request, "cache": str(Path(scratch, "cache"))}}
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # the process has died
            answer = b""
        if answer.startswith(b"{"):
            raise _refusal(json.loads(answer))
        if answer != b"done\n":
            if self._killed:
                raise CancelledError
            self._process = None
            what = task or f"the engine {engine}"
            raise ExportError(
                f"{what} failed (status {_ended(process)}); its last lines were:\n{_tail(log)}",
                where=request.get("model"),
                next_step="lora-export env shows the versions; another --precision may be possible",
            )

    def kill(self) -> None:
        """End the process at once, from any thread: what runs there fails, and nothing runs there any more."""
        with self._starting:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def cool(self) -> None:
        """End a process that was warmed in vain; the next request starts another one."""
        with self._starting:
            if self._process is not None and not self._asked:
                self._process.kill()  # it may be importing still
                _ended(self._process)
                self._process = None

    def close(self) -> None:
        """End the process and remove its folder."""
        self.cool()
        if self._process is not None:
            _ended(self._process)
            self._process = None
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _refusal(told: Mapping[str, Any]) -> LoraExportError:
    """The same error as there."""
    kind = {c.__name__: c for c in (AdapterError, CheckpointError, InputError)}.get(told["error"], ExportError)
    return kind(
        told["found"], where=told["where"], tensor=told["tensor"], expected=told["expected"], next_step=told["next"]
    )


def _start(scratch: str, *modules: str) -> subprocess.Popen[bytes]:
    with Path(scratch, "log.txt").open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", _PROCESS, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            cwd=scratch,
            env=_environment(scratch),
        )


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process, which gets no more requests and is killed if it does not end."""
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):
            stream.close()
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _environment(scratch: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    package_root = str(Path(__file__).resolve().parents[3])
    return kept | {
        "PYTHONPATH": package_root,
        "PYTHONIOENCODING": "utf-8",
        "HF_HOME": str(Path(scratch, "hf")),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }


def _tail(log: Path) -> str:
    """The end of a log without the frames of a traceback, which do not help a user."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    messages = [line for line in lines if not line.startswith((" ", "Traceback")) and not _LOGGED.match(line)]
    return "\n".join(f"    {line[:300]}" for line in messages[-LAST_LINES:])
