"""Running a program on files from elsewhere: in a process of its own, without a network, within limits.

Network isolation and limits need Linux. Where the kernel grants no network namespace (in some containers), the
program keeps the network, and the outcome says so. Files are not hidden from it: `lora_export.allowed` checks
beforehand what it is about to read.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lora_export.errors import InputError

SECONDS = 3600
MEMORY = 8 * 2**30  # bytes for a runtime, in addition to the model
_OUTPUT = 2**20  # bytes at the end of a program's output that are read
_LARGEST_FILE = 2**30
_KEPT = frozenset(
    {
        "PATH", "HOME", "USER", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LANG", "VIRTUAL_ENV", "PYTHONPATH",
        "NODE_PATH",
    }
)  # fmt: skip
_KEPT_PREFIXES = ("LC_", "LD_LIBRARY", "DYLD_", "CUDA", "NVIDIA", "OMP_", "MKL_", "KMP_")


@dataclass(frozen=True)
class Outcome:
    """code: exit code, negative for a signal; None after a timeout. network: 'none', or why there was one."""

    code: int | None
    stdout: str
    stderr: str
    network: str


def run(
    command: Sequence[str], program: str, place: Path, *, memory: int, seconds: int = SECONDS,
    largest: int = _LARGEST_FILE,
) -> Outcome:  # fmt: skip
    """Run `command` in the folder `place` with `program` as its input. OSError if it cannot be started.

    memory: bytes of data of the process; largest: bytes of a file that it may write, if they are more than any
    program may. All processes that it started end with it.
    """
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch, contextlib.ExitStack() as files:
        out, err, notes = (files.enter_context((Path(scratch) / n).open("w+b")) for n in ("out", "err", "notes"))
        limits = {
            "memory": memory,
            "seconds": seconds,
            "file": max(largest, _LARGEST_FILE),
            "notes": notes.fileno(),
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, json.dumps(limits), *command],
            stdin=subprocess.PIPE, stdout=out, stderr=err, cwd=place, env=_environment(scratch),
            pass_fds=[notes.fileno()], start_new_session=True,
        )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(program.encode(), timeout=seconds)
            code = process.poll()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        note = _read(notes)
        if note.startswith("!"):
            raise InputError(f"{command[0]} cannot be started: {note[1:]}", expected="an executable program")
        return Outcome(code, _read(out), _read(err), note or "none")


def _read(file: IO[bytes]) -> str:
    """The end of the output."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _OUTPUT))
    return file.read(_OUTPUT).decode("utf-8", errors="replace")


def _environment(scratch: str) -> dict[str, str]:
    """Offline, without tokens and proxies."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    return kept | {
        "HF_HOME": str(Path(scratch, "hf")),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "USE_HUB_KERNELS": "0",
    }


# Data is limited, not address space: CUDA and V8 reserve far more addresses than they use.
_LAUNCHER = """
import ctypes, json, os, sys
limits, command = json.loads(sys.argv[1]), sys.argv[2:]
notes = os.fdopen(limits["notes"], "w")
NET, USER = 0x40000000, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)
DEATH, KILL = 1, 9
if hasattr(libc, "prctl"):
    libc.prctl(DEATH, KILL, 0, 0, 0)  # it has a session of its own, which nobody ends if its starter is killed
def alone():
    if libc.unshare(NET) == 0:
        return
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NET | USER) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace: " + os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open("/proc/self/" + name, "w") as f:
            f.write(text)
try:
    alone()
except (OSError, AttributeError) as error:
    notes.write(str(getattr(error, "strerror", None) or error))
try:
    import resource
    for name, value in (("DATA", limits["memory"]), ("CPU", limits["seconds"] * (os.cpu_count() or 1)),
                        ("FSIZE", limits["file"]), ("CORE", 0)):
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
except (ImportError, AttributeError, ValueError, OSError) as error:
    notes.write(f" no limits: {error}")
notes.flush()
try:
    os.execvp(command[0], command)
except OSError as error:
    notes.seek(0)
    notes.truncate()
    notes.write("!" + str(error.strerror))
    notes.flush()
    os._exit(127)
"""
