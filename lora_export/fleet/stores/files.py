"""What both kinds of stores share: names within a root, files that are hashed on their way, errors in words."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from lora_export.contracts.fleet import Record, StoredFile
from lora_export.errors import InputError, OutputError
from lora_export.records import NAME, decoded
from lora_export.storage.disk import write_at
from lora_export.storage.sealed import plain_path

BLOCK = 2**20  # bytes that are hashed and written at a time
AGAIN = "run the same command again: it goes on where it was"
_WORDS = (
    (
        frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}),
        "is full",
        "room for all of it",
        "free some space there, and ",
    ),
    (
        frozenset({errno.EACCES, errno.EPERM, errno.EROFS}),
        "does not let this user in",
        "a folder that this user can read and write",
        "change its permissions, and ",
    ),
)

Pulse = Callable[[], None]


def checked_name(name: str, where: str) -> str:
    """InputError for a name that leads out of the root, or is spelled in another than the one normal way."""
    if not plain_path(name):
        raise InputError(
            f"{name!r} is not a name within a root", where=where, expected="a path such as objects/KEY"
        )
    return name


def regular_files(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its relative name, sorted. OutputError for a link and anything special."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        name = path.relative_to(folder).as_posix()
        if not stat.S_ISREG(mode) or not plain_path(name):
            raise OutputError("an object of a fleet holds regular files with plain names", where=path)
        found[name] = path
    return found


def nothing() -> None:
    """Where nobody waits for a sign of life."""


def blocks_of(source: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: source.read(BLOCK), b"")


class Passing:
    """Blocks that somebody else takes, and the file that they were. alive: called after each."""

    def __init__(self, blocks: Iterable[bytes], alive: Pulse = nothing) -> None:
        self._blocks, self._alive = iter(blocks), alive
        self._digest, self._size = hashlib.sha256(), 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        block = next(self._blocks)
        self._digest.update(block)
        self._size += len(block)
        self._alive()
        return block

    @property
    def file(self) -> StoredFile:
        return StoredFile(self._size, self._digest.hexdigest())


def hashed(blocks: Iterable[bytes], alive: Pulse = nothing) -> StoredFile:
    """Size and SHA-256 of a file that is read in blocks."""
    passing = Passing(blocks, alive)
    for _ in passing:
        pass
    return passing.file


def written(blocks: Iterable[bytes], target: Path, alive: Pulse = nothing) -> StoredFile:
    """Write a new file. Size and SHA-256 of the bytes that were written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    passing, at = Passing(blocks, alive), 0
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        for block in passing:
            write_at(fd, block, at)
            at += len(block)
        return passing.file
    except OSError as error:
        error.filename = error.filename or str(target)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling, which becomes the folder at the end. OutputError if there is one."""
    if os.path.lexists(folder):
        raise OutputError("the folder exists", where=folder, expected="a folder that does not exist yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.with_name(f".{folder.name}.{secrets.token_hex(16)}")
    stage.mkdir()
    try:
        yield stage
        stage.rename(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def differences(files: Mapping[str, StoredFile], there: Mapping[str, StoredFile]) -> Iterator[str]:
    """What is wrong with files, against the record, a sentence each."""
    for name in sorted(files.keys() | there.keys()):
        if name not in there:
            yield f"{name} is missing"
        elif name not in files:
            yield f"{name} is not in the record"
        elif files[name].bytes != there[name].bytes:
            yield f"{name} has {there[name].bytes:,} bytes, and {files[name].bytes:,} in the record"
        elif files[name].sha256 != there[name].sha256:
            yield f"{name} has other bytes than the record says"


def record_of(raw: bytes | None, where: str) -> Record | None:
    return None if raw is None else decoded(raw, f"{where}/{NAME}")


def changed(where: str, found: str) -> InputError:
    return InputError(
        f"the object was changed after it was written: {found}", where=where,
        expected="the files that its record names",
        next_step="`lora-export verify ROOT` names all of them; remove the object, and run the fleet again",
    )  # fmt: skip


@contextlib.contextmanager
def disk_errors(where: str, what: str = "the store") -> Iterator[None]:
    """OutputError, in words, for what a disk refuses. what: is written to there."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        place = error.filename2 or error.filename or where
        place = os.fsdecode(place) if isinstance(place, bytes) else str(place)
        for numbers, found, expected, cure in _WORDS:
            if error.errno in numbers:
                raise OutputError(
                    f"{what} {found}: {reason}", where=place, expected=expected, next_step=f"{cure}{AGAIN}"
                ) from None
        raise OutputError(
            f"{what} failed: {reason}", where=place, expected="a disk that works", next_step=AGAIN
        ) from None
