"""Files from elsewhere: regular files of a folder only, JSON within bounds, documents with a digest."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_export.errors import InputError
from lora_export.storage import disk
from lora_export.storage.documents import finite, is_text, parse_json

LARGEST = 256 * 2**20  # bytes of a document that grows with the number of tensors
LARGEST_SETTINGS = 16 * 2**20  # bytes of a file of settings, such as config.json
SETTLED = 2 * 10**9  # nanoseconds since the last change of a file, after which another change would show
_PIECES = 4096  # of the JSON encoder, a word or a bracket each
_LINK = "a link that leads out of the folder"
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class FileHash:
    """size: in bytes."""

    sha256: str
    size: int


_known: dict[bytes, FileHash] = {}  # of files that stay as they are


@contextlib.contextmanager
def opened(path: Path, root: Path | None = None) -> Iterator[io.BufferedReader]:
    """A regular file of the folder `root` (by default the one that it lies in), open for reading.

    A link may lead to a file in `root`, or to the blobs of the Hub cache that `root` is a snapshot of. InputError
    for any other link, also in the path below `root`, and for anything but a regular file, without blocking on a
    FIFO. OSError, with the name, if the file cannot be opened.
    """
    with os.fdopen(_open_beneath(path, root or path.parent), "rb") as file:
        yield file


def _open_beneath(path: Path, root: Path) -> int:
    real = path.resolve()
    home = next((h for h in _homes(root) if h in real.parents), None)
    if home is None:
        raise _not_inside(path, _LINK)
    *folders, name = real.relative_to(home).parts
    try:
        with contextlib.ExitStack() as stack:
            at = _kept(stack, os.open(home, _DIRECTORY))
            for folder in folders:
                at = _kept(stack, os.open(folder, _DIRECTORY, dir_fd=at))
            # By now a link or a FIFO may have replaced the file.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _not_inside(path, _LINK) from None
        error.filename = str(path)
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_inside(path, "not a regular file")
    return fd


def _kept(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _homes(root: Path) -> list[Path]:
    """Where a file of `root` may really lie."""
    folder = root.resolve()
    return [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]


def _not_inside(path: Path, found: str) -> InputError:
    return InputError(
        found,
        where=path,
        expected="a file, or a link within the folder or into the blobs of a Hub cache",
        next_step="copy the file itself into the folder",
    )


def copy(path: Path, target: Path, root: Path | None = None) -> None:
    """Copy the contents of a file that `opened` opens. The mode of the new file is that of the umask."""
    with opened(path, root) as source:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            disk.copy_range(source.fileno(), 0, os.fstat(source.fileno()).st_size, fd, 0)
        except EOFError as error:
            raise InputError(str(error), where=path, expected="a file that does not change meanwhile") from None
        except OSError as error:
            error.filename, error.filename2 = str(path), str(target)
            raise
        finally:
            os.close(fd)


def sha256(path: Path, root: Path | None = None) -> str:
    return hashed(path, root).sha256


def hash_folder(folder: Path) -> dict[str, FileHash]:
    """Name (relative, with /) and hash of every file below `folder`, sorted.

    InputError for a link that leads out of it, for a link to a folder, and for what is neither a file nor a folder.
    """
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            hashes[path.relative_to(folder).as_posix()] = hashed(path, folder)
    return hashes


def sizes(folder: Path) -> dict[str, int]:
    """Name (relative, with /) and size in bytes of every file below `folder`, sorted."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}


def hashed(path: Path, root: Path | None = None) -> FileHash:
    """Of a file that `opened` opens."""
    with opened(path, root) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileHash(digest, os.fstat(file.fileno()).st_size)


def hashed_once(path: Path, root: Path | None = None, *, settled: bool = False) -> FileHash:
    """As `hashed`, but once in a process for a file that stays as it is. One that was changed a moment ago could be
    changed again without a sign of it, and is hashed each time, unless it is `settled`: nobody writes it."""
    status = path.stat()
    sign = status_sign(status)
    known = _known.get(sign)
    if known is None:
        known = hashed(path, root)
        quiet = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED
        if (settled or quiet) and known.size == status.st_size:
            _known[sign] = known
    return known


def status_sign(status: os.stat_result) -> bytes:
    """What changes when a file does."""
    parts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return b"%d %d %d %d %d" % parts


def read_json(path: Path, *, limit: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file; anything else is an InputError that names it. `limit` is in bytes."""
    return _object(_read(path, limit), path)


def _read(path: Path, limit: int) -> bytes:
    try:
        with opened(path) as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", where=path) from None
    except ValueError as error:  # a name that no file can have
        raise InputError(f"the file cannot be read: {error}", where=path) from None
    if len(raw) > limit:
        raise InputError(f"a JSON file of more than {limit} bytes", where=path)
    return raw


def _object(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(raw, len(raw))
    except ValueError as error:
        raise InputError(f"the file is not valid JSON: {error}", where=path) from None
    if not isinstance(value, dict):
        raise InputError("the file does not hold a JSON object", where=path, expected="{…}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON document of this tool, as `json_text` spells it."""
    _write(path, json_text(value))


def _write(path: Path, text: str) -> None:
    """The new file gets its name last, so a link of that name is replaced and never written through."""
    unfinished = path.with_name(f".{path.name}.partial-{secrets.token_hex(16)}")
    try:
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            disk.write_at(fd, text.encode(), 0)
        finally:
            os.close(fd)
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def json_text(value: Mapping[str, Any]) -> str:
    """The text of a JSON document of this tool, the same for the same document; "nan" and "inf" are words."""
    import msgspec

    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False)
    if not is_text(text):
        raise InputError(
            "a name is not valid UTF-8, and JSON cannot hold it",
            expected="files and folders with names in UTF-8",
            next_step="rename the files in the input folders",
        )
    return msgspec.json.format(text, indent=2) + "\n"  # json's own indent is written by Python's loops, slowly


def write_settings(path: Path, value: Mapping[str, Any]) -> None:
    """A model's configuration, in which its libraries read NaN and Infinity as numbers."""
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file with a `digest`: the SHA-256 of the same file without it."""
    write_json(path, {**value, "digest": hashlib.sha256(json_text(value).encode()).hexdigest()})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the digest. InputError if a byte of the file was changed."""
    raw = _read(path, LARGEST)
    value = _object(raw, path)
    digest = value.pop("digest", None)
    if not _is_text_of(raw, {**value, "digest": digest}) or digest != _digest(value):
        raise InputError(
            "the file was changed after it was written: it does not match its digest",
            where=path,
            expected="the file as this tool wrote it",
            next_step="copy it again from where it was made",
        )
    return value


def _is_text_of(raw: bytes, value: Mapping[str, Any]) -> bool:
    """Whether these bytes are the text of a document. Compared piece by piece, as it may be large."""
    at = 0
    try:
        for piece in _encoded(value):
            if not raw.startswith(piece, at):
                return False
            at += len(piece)
    except (ValueError, RecursionError):  # half a character, or nested deeper than anything that is written
        return False
    return at == len(raw)


def _digest(value: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for piece in _encoded(value):
        digest.update(piece)
    return digest.hexdigest()


def _encoded(value: Mapping[str, Any]) -> Iterator[bytes]:
    """`json_text` in pieces."""
    pieces = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False).iterencode(finite(value))
    while some := "".join(itertools.islice(pieces, _PIECES)):
        yield some.encode("utf-8")
    yield b"\n"


def plain_name(name: str) -> bool:
    """Whether a file name from a model stays inside its folder."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\\0:")


def plain_path(name: str) -> bool:
    """Whether a path from a model stays inside its folder, and is spelled in the one normal way."""
    path = PurePosixPath(name)
    return bool(path.parts) and path.as_posix() == name and all(map(plain_name, path.parts))


def refuse_outward_link(path: Path, root: Path | None = None) -> None:
    """InputError for a link that leads out of `root` (by default the folder that it lies in).

    Through any link that `opened` does not follow, this process would read a file that did not come with the model
    and copy it into its output.
    """
    real = path.resolve()
    if not any(home in real.parents for home in _homes(root or path.parent)):
        raise _not_inside(path, _LINK)


def refuse_special(folder: Path) -> None:
    """InputError for a FIFO, socket or device in a folder: a library that opens it would block forever."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise _not_inside(path, "not a regular file")
