"""Locks: of an output, which has one writer at a time, by a file beside it that names the process holding it; and
of a folder that many processes read, and that nobody removes meanwhile."""

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from lora_export.errors import OutputError

PATIENCE = 0.2  # seconds for the holder of the lock to write its name, or to finish


@contextlib.contextmanager
def locked(final: Path) -> Iterator[None]:
    """Hold `.NAME.lock` of the output `final`. OutputError if another process does, or if it is not a file."""
    from filelock import FileLock, Timeout

    path = final.with_name(f".{final.name}.lock")
    _refuse_planted(path)
    try:
        held = FileLock(path).acquire(timeout=PATIENCE, poll_interval=PATIENCE / 10)
    except Timeout:
        raise OutputError(
            f"another process{_holder(path)} is writing this output",
            where=final,
            expected="one writer at a time",
            next_step="wait for it, or choose another -o",
        ) from None
    with held:
        try:
            # In the format that filelock itself uses where files cannot be locked, to recognize a dead holder.
            _write(path, f"{os.getpid()}\n{socket.gethostname()}\n")
            yield
        finally:
            # Only its holder removes it, and filelock grants no lock on a file that is gone.
            path.unlink(missing_ok=True)


# --- folders that many read ----------------------------------------------------------------------------------


def held(folder: Path, patience: float | None = None) -> int:
    """A descriptor of a folder, made where it is missing, that others may hold too, and that nobody removes before
    it is closed. OutputError if somebody is alone with it for `patience` seconds (None: wait)."""
    until = None if patience is None else time.monotonic() + patience
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        fd = _folder_lock(folder, fcntl.LOCK_SH | (fcntl.LOCK_NB if until is not None else 0))
        if fd is not None:
            return fd
        if until is not None and time.monotonic() > until:
            raise OutputError("another process keeps the folder to itself", where=folder)
        time.sleep(0.01)


def held_alone(folder: Path) -> int | None:
    """A descriptor of a folder that nobody else holds before it is closed or shared; None where others do."""
    return _folder_lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)


def share(fd: int, folder: Path) -> bool:
    """Let others hold the folder that one was alone with; False, with the descriptor closed, if it was removed."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(fd), folder.lstat()):
            return True
    os.close(fd)
    return False


def _folder_lock(folder: Path, how: int) -> int | None:
    """A locked descriptor of what still has this name; None if it has not, or if others hold it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, how)
        if os.path.samestat(os.fstat(fd), folder.lstat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


# --- outputs -------------------------------------------------------------------------------------------------


def _refuse_planted(path: Path) -> None:
    """OutputError for a lock that is a link, has a second name, or is not a regular file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    _check(path, status)


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise OutputError(
            "the lock of the output is a link, or not a file",
            where=path,
            expected="a regular file, or nothing",
            next_step="find out what it is and who created it, and delete it",
        )


def _write(path: Path, text: str) -> None:
    fd = _opened(path, os.O_RDWR)
    try:
        os.ftruncate(fd, 0)
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _opened(path: Path, flags: int) -> int:
    """A descriptor of the lock. OutputError if it is not a regular file with one name."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        with os.fdopen(_opened(path, os.O_RDONLY), encoding="utf-8", errors="replace") as file:
            number, host, *_ = [*file.read(1000).split("\n"), "", ""]
    except (OSError, OutputError):
        return ""
    elsewhere = f" on {host}" if host not in ("", socket.gethostname()) else ""
    return f" (PID {number}{elsewhere})" if number else ""
