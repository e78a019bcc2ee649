"""All-or-nothing output folders, locks, hashes and safe paths: the one implementation for every stage."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.errors import GateFailed, InputError, OutputError

COPY_BLOCK = 2**21  # bytes that go through this process at a time
# Bytes of one write. A larger one has the file system ask for large pages, which a virtual machine may have to get
# from its host first: the same merge took 0.9 or 3 seconds.
WRITE_BLOCK = 2**18
# Across file systems, on old kernels, or on a file system that does not know how.
_CANNOT_COPY = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux


@contextlib.contextmanager
def output_folder(final: Path, force: bool, *, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a hidden sibling of `final`; on success it is synced and renamed to `final`, else it is removed.

    A GateFailed inside moves it to `final.failed` instead, with a file FAILED that says why. `final` may
    exist only if it is empty or `force` is given; it may neither contain nor lie inside any of `inputs`.
    """
    final = final.resolve() if final.name in ("", "..") else final.absolute()
    _check_target(final, force, inputs)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _lock(final):
        _clean_leftovers(final)
        _check_target(final, force, inputs)  # again: another run may have written it, or a leftover was put back
        stage = final.with_name(f".{final.name}.partial-{os.getpid()}")
        stage.mkdir()
        try:
            yield stage
            sync_tree(stage)
            replace_folder(stage, final)
        except GateFailed as failure:
            (stage / "FAILED").write_text(failure.message() + "\n", encoding="utf-8")
            sync_tree(stage)
            replace_folder(stage, failed_folder(final))
            raise
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def failed_folder(final: Path) -> Path:
    """Where an output that did not pass its gates is kept."""
    return final.with_name(final.name + ".failed")


def _check_target(final: Path, force: bool, inputs: Sequence[Path]) -> None:
    for source in inputs:
        real, target = source.resolve(), final.resolve()
        if real == target or real in target.parents or target in real.parents:
            raise OutputError(
                "the output and an input lie inside each other, so writing would change the input",
                where=final,
                expected=f"an output folder outside {source}",
                next_step="choose another folder with -o",
            )
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise OutputError("the output path is a file or a link", where=final, expected="a folder, or nothing")
    if final.is_dir() and any(final.iterdir()) and not force:
        raise OutputError(
            "the output folder exists and is not empty",
            where=final,
            expected="a folder that does not exist yet",
            next_step="add --force to replace it as a whole, or choose another -o",
        )


@contextlib.contextmanager
def _lock(final: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = final.with_name(f".{final.name}.lock")
    try:
        with FileLock(path, timeout=0):
            path.write_text(str(os.getpid()))
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        holder = path.read_text().strip() if path.exists() else ""
        raise OutputError(
            f"another process{f' (PID {holder})' if holder else ''} is writing this output",
            where=final,
            expected="one writer at a time",
            next_step="wait for it, or choose another -o",
        ) from None


def _clean_leftovers(final: Path) -> None:
    """Remove what a killed run left; put back an output that it had moved away. Called under the lock."""
    for old in final.parent.glob(f".{final.name}.old-*"):
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    for stale in final.parent.glob(f".{final.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)


def replace_folder(stage: Path, final: Path) -> None:
    """Make `stage` the folder `final` in one step; what was there before is removed afterwards."""
    if not final.exists() or not any(final.iterdir()):
        stage.replace(final)
    elif _exchange(stage, final):
        shutil.rmtree(stage)
    else:
        # Without an atomic exchange (not Linux) there is a moment with neither name; _clean_leftovers mends it.
        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        final.rename(old)
        stage.replace(final)
        shutil.rmtree(old)
    _sync(final.parent)


def _exchange(a: Path, b: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return bool(done == 0)


def start_writing_back(fd: int, at: int, length: int) -> None:
    """Have the disk begin with bytes that were written, so that the sync at the end finds little left to do."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        if path.is_file():
            raise  # some file systems cannot sync a folder; a file that cannot be synced is a lost file
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def check_space(folder: Path, needed: int) -> None:
    """Refuse before the first byte if `folder`'s file system lacks `needed` bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            where=folder,
            expected="enough space for the whole output",
            next_step="free some space, or choose another -o",
        )


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Name (relative, with /), SHA-256 and size in bytes of every file below `folder`, sorted."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): {"sha256": sha256(p), "size": p.stat().st_size} for p in paths}


def read_json(path: Path, *, limit: int = 256 * 2**20) -> dict[str, Any]:
    """The JSON object in a file; anything else is an InputError that names it. `limit` is in bytes."""
    try:
        refuse_outward_link(path)
        if path.stat().st_size > limit:
            raise InputError(f"a JSON file of more than {limit} bytes", where=path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"the file is not valid JSON: {error}", where=path) from None
    if not isinstance(value, dict):
        raise InputError("the file holds no JSON object", where=path, expected="{…}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plain_name(name: str) -> bool:
    """Whether a file name that came with a model stays inside its folder."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\\0:")


def refuse_outward_link(path: Path) -> None:
    """A link in a model's folder may lead to a file of that folder, or to the blobs of the hub cache that it is in.

    Any other link would have this process read, and copy into its output, a file that did not come with the model.
    """
    if not path.is_symlink():
        return
    target, folder = path.resolve(), path.parent.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(home in target.parents for home in homes):
        raise InputError(
            "a link that leads out of the folder",
            where=path,
            expected="a file, or a link within the folder or into the blobs of a hub cache",
            next_step="copy the file itself into the folder",
        )


def copy_range(source: int, start: int, length: int, target: int, at: int) -> None:
    """Copy bytes between file descriptors, in the kernel where it can, to the position `at`."""
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
            raise OSError("a file ended while it was being copied")
        start, at, length = start + done, at + done, length - done


def write_at(fd: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at a position of the file."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view[:WRITE_BLOCK], at)
        view, at = view[done:], at + done
