"""Work in progress in a root that is a folder: who is writing, and what a killed writer left.

A writer on another machine cannot be asked whether it lives. So each holds a lock while it writes and touches it
now and then, and what it writes lies beside the lock. Nobody holds the lock of a killed writer: it is removed at
once where the lock was made by this kernel, and after `AGE` without a touch where it was made by another, because
some network file systems have locks that other machines do not see.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.storage.boot import boot_id

FOLDER = ".writing"
AGE = 3600.0  # seconds by the clock of the file system
TOUCH = 60.0  # seconds between two touches
_NAME = re.compile(r"[\w.-]+\.\d+\.[0-9a-f]{32}\.lock")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@dataclass
class Writing:
    """A name below ROOT/.writing of one writer. path: free for a file or a folder."""

    path: Path
    lock: Path
    fd: int
    _touched: float = field(default_factory=time.monotonic)

    def alive(self) -> None:
        """To be called more often than every few minutes of work."""
        if time.monotonic() - self._touched > TOUCH:
            os.utime(self.fd)
            self._touched = time.monotonic()


@contextlib.contextmanager
def writing(root: Path) -> Iterator[Writing]:
    """A place for work in progress; what is left there at the end is removed."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mine = _locked(folder)
    try:
        clean(root, mine)
        yield mine
    finally:
        _gone(mine.path)
        mine.lock.unlink(missing_ok=True)
        os.close(mine.fd)


def _locked(folder: Path) -> Writing:
    while True:
        name = f"{_host()}.{os.getpid()}.{secrets.token_hex(16)}"
        lock = folder / f"{name}.lock"
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        # Before it is locked, another process may take it for a leftover.
        if _take(fd) is not False and _is_at(lock, fd):
            os.write(fd, f"{_kernel()}\n".encode())
            return Writing(folder / name, lock, fd)
        lock.unlink(missing_ok=True)
        os.close(fd)


def _take(fd: int) -> bool | None:
    """Whether the lock was free, and is held now; None where files cannot be locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_at(path: Path, fd: int) -> bool:
    try:
        status, own = path.lstat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == (own.st_dev, own.st_ino)


def clean(root: Path, mine: Writing | None = None) -> list[str]:
    """Remove what killed writers left; the names. Their time is compared with that of `mine`, by one clock."""
    removed = []
    for lock in sorted((root / FOLDER).glob("*.lock")):
        if (mine is None or lock != mine.lock) and _NAME.fullmatch(lock.name) and _clean_one(lock, mine):
            removed.append(lock.name.removesuffix(".lock"))
    return removed


def _clean_one(lock: Path, mine: Writing | None) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # gone, a link, or of another user
        return False
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        taken = _take(fd)
        if taken is False or not _is_at(lock, fd):
            return False
        here = os.read(fd, 100).decode("utf-8", "replace").strip() == _kernel()
        if not (taken and here) and _now(mine) - status.st_mtime < AGE:
            return False
        _gone(lock.with_suffix(""))
        _gone(lock.with_suffix(".old"))
        lock.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _now(mine: Writing | None) -> float:
    """By the clock of the file system, where something was written there just now."""
    if mine is None:
        return time.time()
    os.utime(mine.fd)
    return os.fstat(mine.fd).st_mtime


def _gone(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:60] or "host"


def _kernel() -> str:
    """What two processes share whose locks exclude each other: a boot of a kernel, also seen from containers."""
    return boot_id() or socket.gethostname()
