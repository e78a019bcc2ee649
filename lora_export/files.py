"""All-or-nothing output folders, locks, hashes and safe paths: the one implementation for every stage."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lora_export.errors import GateFailed, InputError, OutputError
from lora_export.interrupts import Interrupts

COPY_BLOCK = 2**21  # bytes that go through this process at a time
# Bytes of one write. A larger one has the file system ask for large pages, which a virtual machine may have to get
# from its host first: the same merge took 0.9 or 3 seconds.
WRITE_BLOCK = 2**18
SYNC_BLOCK = 2**25  # bytes that are on their way to the disk at a time, and so what Ctrl-C may have to wait for
LOCK_PATIENCE = 0.2  # seconds, for one who holds the lock to say who it is, or to be gone
# Across file systems, on old kernels, or on a file system that does not know how.
_CANNOT_COPY = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})
_NOT_SUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_FILE_RANGE_WRITE, _WRITE_AND_WAIT = 2, 7
_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)  # Linux
_renameat2 = getattr(_libc, "renameat2", None)  # Linux


@contextlib.contextmanager
def output_folder(final: Path, force: bool, *, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a hidden sibling of `final`; on success it is synced and renamed to `final`, else it is removed.

    A GateFailed inside moves it to `final.failed` instead, with a file FAILED that says why. `final` may
    exist only if it is empty or `force` is given; it may neither contain nor lie inside any of `inputs`.
    """
    final = final.resolve() if final.name in ("", "..") else final.absolute()
    _check_target(final, force, inputs)
    with Interrupts() as interrupts, _full_disk_told(final), _parents(final), _lock(final):
        with interrupts.welcome():
            _clean_leftovers(final)
        _check_target(final, force, inputs)  # again: another run may have written it, or a leftover was put back
        stage = final.with_name(f".{final.name}.partial-{os.getpid()}")
        try:
            stage.mkdir()
            with interrupts.welcome():
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


@contextlib.contextmanager
def output_file(final: Path, force: bool, *, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a hidden folder beside `final`; on success the file of its name in there is synced and becomes `final`.

    `final` may exist only if `force` is given, and may not lie inside any of `inputs`.
    """
    final = final.absolute()
    if final.is_dir() or final.is_symlink():
        raise OutputError("the output path is a folder or a link", where=final, expected="a file, or nothing")
    if any(_inside(final.parent.resolve(), source) for source in inputs):
        raise OutputError("the output lies inside an input", where=final, expected="another folder for it")
    if final.exists() and not force:
        raise OutputError(
            "the output exists",
            where=final,
            expected="a file that does not exist yet",
            next_step="add --force to replace it, or choose another -o",
        )
    with Interrupts() as interrupts, _full_disk_told(final), _parents(final), _lock(final):
        work = final.with_name(f".{final.name}.partial-{os.getpid()}")
        try:
            with interrupts.welcome():
                _clean_leftovers(final)
                work.mkdir()
                yield work
                sync(work / final.name)
            (work / final.name).replace(final)
            sync(final.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def added_to(folder: Path) -> Iterator[None]:
    """Be the only writer of a folder that others read meanwhile: files are made whole, and then renamed."""
    with only_writer(folder) as interrupts:
        with interrupts.welcome():
            yield
        sync(folder)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[Interrupts]:
    """Hold the lock of a folder. Interrupts wait, but where what is yielded is told that they are welcome."""
    with Interrupts() as interrupts, _full_disk_told(folder), _lock(folder.absolute()):
        yield interrupts


def failed_folder(final: Path) -> Path:
    """Where an output that did not pass its gates is kept."""
    return final.with_name(final.name + ".failed")


def _check_target(final: Path, force: bool, inputs: Sequence[Path]) -> None:
    for source in inputs:
        if _inside(final.resolve(), source) or any(_inside(p, final) for p in _real_paths(source)):
            raise OutputError(
                "the output and an input lie inside each other, so writing would change the input",
                where=final,
                expected=f"an output folder outside {source}",
                next_step="choose another folder with -o",
            )
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise OutputError("the output path is a file or a link", where=final, expected="a folder, or nothing")
    if final.is_mount():
        raise OutputError(
            "the output folder is a mount point, which cannot be replaced as a whole",
            where=final,
            expected="a folder below it",
            next_step=f"-o {final / 'merged'}",
        )
    if final.is_dir() and any(final.iterdir()) and not force:
        raise OutputError(
            "the output folder exists and is not empty",
            where=final,
            expected="a folder that does not exist yet",
            next_step="add --force to replace it as a whole, or choose another -o",
        )


def _inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies below it: by inodes, as bind mounts and capitals add names."""
    return folder.exists() and any(p.exists() and p.samefile(folder) for p in (path, *path.parents))


def _real_paths(source: Path) -> list[Path]:
    """Where an input really lies: in a hub cache its files are links to blobs elsewhere."""
    links = [p for p in source.iterdir() if p.is_symlink()] if source.is_dir() else []
    return [p.resolve() for p in (source, *links)]


@contextlib.contextmanager
def _parents(final: Path) -> Iterator[None]:
    """Make the folders that `final` is to lie in, and remove them again if it does not come to be."""
    missing = [p for p in final.parents if not p.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        if not final.exists():
            for folder in missing:
                with contextlib.suppress(OSError):  # not empty: somebody else has use for it
                    folder.rmdir()


@contextlib.contextmanager
def _lock(final: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = final.with_name(f".{final.name}.lock")
    try:
        held = FileLock(path).acquire(timeout=LOCK_PATIENCE, poll_interval=LOCK_PATIENCE / 10)
    except Timeout:
        raise OutputError(
            f"another process{_holder(path)} is writing this output",
            where=final,
            expected="one writer at a time",
            next_step="wait for it, or choose another -o",
        ) from None
    with held:
        try:
            # As filelock itself writes it where files cannot be locked: it tells a dead holder by that.
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
            yield
        finally:
            # Only who holds it removes it, and filelock gives nobody a lock on a file that is gone.
            path.unlink(missing_ok=True)


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says it."""
    try:
        number, host, *_ = [*path.read_text().split("\n"), "", ""]
    except OSError:
        return ""
    elsewhere = f" on {host}" if host not in ("", socket.gethostname()) else ""
    return f" (PID {number}{elsewhere})" if number else ""


@contextlib.contextmanager
def _full_disk_told(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OutputError(
            f"{error.strerror}: the disk became full while the output was being written",
            where=error.filename2 or error.filename or final,
            expected="enough space for the whole output",
            next_step="free some space, or choose another -o",
        ) from None


def _clean_leftovers(final: Path) -> None:
    """Remove what a killed run left; put back an output that it had moved away. Called under the lock."""
    for old in _leftovers(final, "old"):
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    for stale in _leftovers(final, "partial"):
        shutil.rmtree(stale, ignore_errors=True)


def _leftovers(final: Path, kind: str) -> list[Path]:
    """By the whole name: no pattern that also fits what belongs to another output."""
    name = re.compile(rf"\.{re.escape(final.name)}\.{kind}-\d+")
    return [p for p in final.parent.iterdir() if name.fullmatch(p.name)]


def replace_folder(stage: Path, final: Path) -> None:
    """Make `stage` the folder `final` in one step, see it on disk, and remove what was there before.

    OSError if either cannot be done; then everything is as it was.
    """
    existed = final.exists()
    _rename(stage, final, existed)
    try:
        sync(final.parent)
    except OSError:
        _rename(final, stage, existed)
        raise
    if existed:
        _remove_replaced(stage, final)


def exchange(a: Path, b: Path) -> None:
    """Two folders change names, in one step where the system and the file system know how."""
    _rename(a, b, swap=True)


def _rename(a: Path, b: Path, swap: bool) -> None:
    """Rename the folder `a` to `b`; with `swap`, where there is a `b` already, that becomes `a`."""
    if not swap:
        a.replace(b)
    elif not _exchange(a, b):
        # Without an atomic exchange there is a moment with neither name; _clean_leftovers mends it after a kill.
        old = b.with_name(f".{b.name}.old-{os.getpid()}")
        b.rename(old)
        try:
            a.replace(b)
        except BaseException:
            old.rename(b)
            raise
        old.rename(a)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system does not know how."""
    if _renameat2 is None:
        return False
    if _renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(b))


def _remove_replaced(old: Path, final: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise OutputError(
            f"the new output is complete and in place, but what it replaced cannot be removed: {error.strerror}",
            where=error.filename or old,
            expected=f"an older output that may be deleted; {final} is the new one",
            next_step=f"delete {old} yourself",
        ) from None


def start_writing_back(fd: int, at: int, length: int) -> None:
    """Have the disk begin with bytes that were written, so that the sync at the end finds little left to do."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
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
    return {p.relative_to(folder).as_posix(): hashed(p) for p in paths}


def sizes(folder: Path) -> dict[str, int]:
    """Name (relative, with /) and size in bytes of every file below `folder`, sorted."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}


def hashed(path: Path) -> dict[str, Any]:
    """SHA-256 and size in bytes of a file."""
    return {"sha256": sha256(path), "size": path.stat().st_size}


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
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: Mapping[str, Any]) -> str:
    """As every JSON file of this tool is written: one document, one text."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file with a `digest`: the SHA-256 of the same file without it."""
    write_json(path, {**value, "digest": _digest(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the digest. InputError if a byte of the file is not as it was written."""
    value = read_json(path)
    try:
        text = path.read_bytes().decode("utf-8")  # as text, \r would read as \n
    except (OSError, ValueError) as error:
        raise InputError(f"the file cannot be read: {error}", where=path) from None
    digest = value.pop("digest", None)
    try:
        whole = digest == _digest(value) and text == json_text({**value, "digest": digest})
    except ValueError:  # half a character, which no file can hold
        whole = False
    if not whole:
        raise InputError(
            "the file was changed after it was written: it does not agree with its own digest",
            where=path,
            expected="the file as this tool wrote it",
            next_step="take it from where it was made",
        )
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(value).encode()).hexdigest()


def plain_name(name: str) -> bool:
    """Whether a file name that came with a model stays inside its folder."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\\0:")


def plain_path(name: str) -> bool:
    """Whether a name with / that came with a model stays inside its folder, and is spelled as it always is."""
    path = PurePosixPath(name)
    return bool(path.parts) and path.as_posix() == name and all(map(plain_name, path.parts))


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
