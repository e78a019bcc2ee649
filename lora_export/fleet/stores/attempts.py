"""Names of attempts in an object store: PLACE/ATTEMPT/…, one folder for each upload of an object.

An object store has no locks. So the name of an attempt says which kernel and process it is of, by hashes that only
the same kernel can compare with the processes that live there. An attempt of another machine counts as given up
when nothing was added for `AGE`.
"""

import hashlib
import os
import re
import secrets
from datetime import timedelta
from pathlib import Path

from lora_export.storage.boot import boot_id, process_numbers

AGE = timedelta(days=1)  # longer than the upload of one file takes
_NAME = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})-[0-9a-f]{16}")
_PROC = Path("/proc")
_failed: set[str] = set()  # attempts of this process that it gave up itself


def attempt_name() -> str:
    return f"{_kernel()}-{_process(os.getpid())}-{secrets.token_hex(8)}"


def is_attempt(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def give_up(name: str) -> None:
    """Of an attempt of this process whose files could not be removed, or not yet."""
    _failed.add(name)


def given_up(name: str, silent: timedelta) -> bool:
    """Whether nobody works on an attempt any more, as far as can be seen from here. silent: since its last file."""
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    if silent > AGE or name in _failed:
        return True
    return found[1] == _kernel() and found[2] not in _living()


def _living() -> set[str]:
    """Hashes of all processes that this one can see."""
    return {_process(int(p.name)) for p in _PROC.iterdir() if p.name.isdecimal()}


def _kernel() -> str:
    """A boot of a kernel, and the processes that can see each other there (a container has its own)."""
    boot, pids = boot_id(), process_numbers()
    return _short(f"{boot}\n{pids}") if boot and pids else secrets.token_hex(4)  # not Linux: like another machine


def _process(pid: int) -> str:
    """A process, told apart from a later one of the same number by when it began."""
    try:
        words = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return _short(f"{pid} is gone")
    return _short(f"{pid} {words[19]}")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
