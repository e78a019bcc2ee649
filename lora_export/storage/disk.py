"""Bytes and names on the disk: copied, synced, exchanged in one step, and whether there is room for them."""

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

from lora_export.errors import OutputError

COPY_BLOCK = 2**21  # bytes that go through this process at a time

# Bytes of one write. A larger one has the file system ask for large pages, which a virtual machine may have to get
# from its host first: the same merge took 0.9 or 3 seconds.
WRITE_BLOCK = 2**18

SYNC_BLOCK = 2**25  # bytes that are on their way to the disk at a time, and so what Ctrl-C may have to wait for

# Across file systems, on old kernels, or on a file system that does not know how.
_CANNOT_COPY = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})

_NOT_SUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})

_RENAME_EXCHANGE = 2

_AT_FDCWD = -100

_SYNC_FILE_RANGE_WRITE, _WRITE_AND_WAIT = 2, 7

_unsynced: ContextVar[bool] = ContextVar("unsynced", default=False)

_libc = ctypes.CDLL(None, use_errno=True)

_sync_file_range = getattr(_libc, "sync_file_range", None)  # Linux

_renameat2 = getattr(_libc, "renameat2", None)  # Linux


def exchange_names(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system does not know how."""
    if _renameat2 is None:
        return False
    if _renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(b))


def start_writing_back(fd: int, at: int, length: int) -> None:
    """Have the disk begin with bytes that were written, so that the sync at the end finds little left to do."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def unsynced() -> Iterator[None]:
    """Leave it to the system when bytes reach the disk: nobody reads scratch after a crash of the machine."""
    before = _unsynced.set(True)
    try:
        yield
    finally:
        _unsynced.reset(before)


def sync(path: Path) -> None:
    """fsync a file or a folder; nothing within `unsynced`."""
    if _unsynced.get():
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        if path.is_file():
            _write_back(fd)
        os.fsync(fd)
    except OSError as error:
        # Some file systems cannot sync a folder; a file that cannot be synced is a lost file.
        if path.is_file() or error.errno not in _NOT_SUPPORTED:
            error.filename = str(path)
            raise
    finally:
        os.close(fd)


def _write_back(fd: int) -> None:
    """Send a file to the disk in pieces where the system knows how: an fsync of gigabytes hears no Ctrl-C."""
    if _sync_file_range is None:
        return
    for at in range(0, os.fstat(fd).st_size, SYNC_BLOCK):
        if _sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(SYNC_BLOCK), _WRITE_AND_WAIT) != 0:
            number = ctypes.get_errno()
            if number in _NOT_SUPPORTED:
                return
            raise OSError(number, os.strerror(number))


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def check_space(folder: Path, needed: int) -> None:
    """Refuse before the first byte if `folder`'s file system lacks `needed` bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{size_of(needed)} are needed and {size_of(free)} are free",
            where=folder,
            expected="enough space for the whole output",
            next_step="free some space, or choose another -o",
        )


def size_of(count: int) -> str:
    """A number of bytes, in gigabytes where that says enough."""
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count:,} bytes"


def regular_size(path: Path) -> int | None:
    """Bytes of a file; None if it is not a regular one."""
    status = path.stat()
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def written(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir())


def emptied(folder: Path) -> None:
    """Remove a folder, also where the work has made parts of it read-only."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for root, folders, _ in os.walk(folder):
            for name in folders:
                with contextlib.suppress(OSError):
                    Path(root, name).chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)


def bytes_in(folders: Iterable[Path]) -> int:
    """Bytes on the disk of all files below; those that vanish meanwhile count as nothing."""
    total = 0
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    total += Path(root, name).lstat().st_blocks * 512
    return total


def copy_range(source: int, start: int, length: int, target: int, at: int) -> None:
    """Copy bytes between file descriptors, in the kernel where it can, to the position `at`.

    EOFError if the source is too short.
    """
    in_kernel = hasattr(os, "copy_file_range")
    while length:
        done = 0
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, length, start, at)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
                in_kernel = False
        if not in_kernel:
            block = os.pread(source, min(length, COPY_BLOCK), start)
            done = len(block)
            write_at(target, block, at)
        if not done:
            raise EOFError("a file ended while it was being copied")
        start, at, length = start + done, at + done, length - done


def write_at(fd: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at a position of the file."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view[:WRITE_BLOCK], at)
        view, at = view[done:], at + done
