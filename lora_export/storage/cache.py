"""Folders that a user keeps between commands: found by a key, bounded in size, the least recently used go first.

    ROOT/bases/KEY/PART/hashes.json   sealed: the size and SHA-256 of each file
    ROOT/bases/KEY/PART/files/…       as they were put there

A part gets its name when it is whole, so that a kill at any moment leaves nothing that anybody takes. What is taken
is hashed first. Nobody but the user may write there, and no link in it is followed. An entry is locked while it is
open: by all who use it together, and by one that removes it alone. A cache that cannot be used costs time, never a
result: `OutputError` says why it cannot.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.errors import InputError, OutputError
from lora_export.storage import disk, locks, sealed
from lora_export.storage.documents import as_json, decode
from lora_export.storage.sealed import FileHash

FILES, HASHES = "files", "hashes.json"
_FOLDER = "bases"
_SCHEMA = 1
_THERE = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_GONE, _NEW = ".gone-", ".new-"
_PATIENCE = 10.0  # seconds for another command to finish looking at an entry
_SPARE = 2**30  # bytes that a copy into the cache leaves free on the disk
_THREADS = 4


@dataclass(frozen=True)
class PartDocument:
    schema_version: int
    files: Mapping[str, FileHash]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A part whose hashes were checked. about: what was said of it when it was put there."""

    folder: Path
    files: Mapping[str, FileHash]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Cache:
    """limit: in bytes, of all entries together."""

    root: Path
    limit: int

    @property
    def folder(self) -> Path:
        return self.root / _FOLDER

    def open(self, key: str, parts: Sequence[str]) -> "Entry":
        """The entry of a key, made where there is none, with those of the parts that are there and sound.

        OutputError if this cache cannot be used.
        """
        self.prepare()
        try:
            while True:
                entry = self._opened(key)
                try:
                    entry.look(parts)
                    if entry.share():
                        return entry
                except BaseException:
                    entry.close()
                    raise
        except OSError as error:
            raise OutputError(error.strerror or str(error), where=error.filename or self.root) from None

    def prepare(self) -> None:
        """Make the folder. OutputError if it cannot be used, or if others may write there."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            found = (self.root, self.root.stat(), stat.S_IWOTH), (self.folder, self.folder.lstat(), 0o022)
        except OSError as error:
            raise OutputError(error.strerror or str(error), where=error.filename or self.root) from None
        for place, status, others in found:
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & others:
                raise OutputError(
                    "not a folder that this user alone may write to: others could choose what results are made of",
                    where=place,
                    expected="a folder of this user",
                    next_step="chmod go-w, or another --cache",
                )

    def _opened(self, key: str) -> "Entry":
        place = self.folder / key
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
        fd = locks.held_alone(place)
        if fd is None:
            return Entry(self, place, locks.held(place, _PATIENCE), alone=False)
        return Entry(self, place, fd, alone=True)

    def entries(self) -> list[Path]:
        """The folders of all keys, the least recently used first."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                        found.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
        return [path for _, path in sorted(found)]

    def make_room(self, nbytes: int, own: Path) -> bool:
        """Remove entries that nobody uses until `nbytes` more fit beside the others; False if they do not."""
        every = self.entries()
        sizes = {path: disk.bytes_in([path]) for path in every}
        for path in every:
            if sum(sizes.values()) + nbytes <= self.limit:
                break
            if path != own and self._removed(path):
                del sizes[path]
        for left in self.folder.glob(f"{_GONE}*"):  # of a command that was killed while it removed one
            _delete(left)
        return sum(sizes.values()) + nbytes <= self.limit

    def _removed(self, path: Path) -> bool:
        """Whether an entry was removed: nobody had it open."""
        try:
            fd = locks.held_alone(path)
        except OSError:
            return False
        if fd is None:
            return False
        try:
            return _removed(path)
        finally:
            os.close(fd)


@dataclass
class Entry:
    """An open entry. alone: nobody else has it open; found: the parts that were there, and sound; damaged: what was
    not, in words."""

    cache: Cache
    folder: Path
    _lock: int
    alone: bool
    found: dict[str, Part] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def look(self, parts: Sequence[str]) -> None:
        """Find these parts, and clean up what a killed command left, if nobody else has the entry open."""
        if self.alone:
            for left in (*self.folder.glob(".*"), *self.folder.glob("*/.*")):
                _delete(left)
        with contextlib.suppress(OSError):
            os.utime(self._lock)  # used now
        for name in parts:
            part = self._part(name)
            if part is not None:
                self.found[name] = part

    def _part(self, name: str) -> Part | None:
        """A part that is as it was put there, or None. A damaged one is removed, if nobody else has it open."""
        place = self.folder / name
        try:
            if not stat.S_ISDIR(place.lstat().st_mode):
                raise InputError("not a folder", where=place)
            raw = sealed.read_sealed(place / HASHES)
            document = decode(raw, PartDocument, "the hashes of a part", place / HASHES)
            if document.schema_version != _SCHEMA or _hashes(place / FILES) != document.files:
                raise InputError("the files are not those that were put there", where=place)
            return Part(place / FILES, document.files, document.about)
        except FileNotFoundError:
            if not place.is_dir():
                return None
            found = "a file is missing"
        except InputError as error:
            found = error.found
        except OSError as error:
            found = str(error.strerror)
        removed = ", and is removed" if self.alone and _removed(place) else ""
        self.damaged.append(f"{name} was damaged{removed}: {found}")
        return None

    def share(self) -> bool:
        """Let others open it, too. False if it was removed meanwhile: then it is closed."""
        if not self.alone:
            return True
        self.alone = False
        return locks.share(self._lock, self.folder)

    def keep(self, name: str, source: Path, about: Mapping[str, Any]) -> Part:
        """Have a folder as a part: moved there, or copied from another disk. OutputError if it cannot be kept; then
        the folder is where it was."""
        new, place = self.folder / f"{_NEW}{secrets.token_hex(16)}", self.folder / name
        moved = False
        try:
            nbytes = sum(sealed.sizes(source).values())
            if not self.cache.make_room(nbytes, self.folder):
                raise OutputError(
                    f"{disk.size_of(nbytes)} more than fit into the {disk.size_of(self.cache.limit)} of the cache",
                    where=self.folder,
                    next_step="give it more with --cache-size",
                )
            new.mkdir(mode=0o700)
            moved = _moved(source, new / FILES)
            files = _hashes(new / FILES)
            document = PartDocument(_SCHEMA, files, dict(about))
            sealed.write_sealed(new / HASHES, as_json(document))
            place.parent.mkdir(mode=0o700, exist_ok=True)
            new.rename(place)
            moved = False
        except OSError as error:
            faster = self._part(name) if error.errno in _THERE else None  # another command was, with the same
            if faster is None:
                raise OutputError(error.strerror or str(error), where=error.filename or place) from None
            return faster
        finally:
            if moved:
                (new / FILES).rename(source)
            shutil.rmtree(new, ignore_errors=True)
        return Part(place / FILES, files, document.about)

    def drawn(self, name: str, below: int) -> int:
        """A number that nobody can know before the first command draws it, and that later ones find. OSError if it
        cannot be written down."""
        place = self.folder / name
        try:
            found = sealed.read_sealed(place)["number"]
        except (FileNotFoundError, InputError, KeyError):
            new = self.folder / f"{_NEW}{secrets.token_hex(16)}"
            sealed.write_sealed(new, {"number": secrets.randbelow(below)})
            new.replace(place)
            found = sealed.read_sealed(place)["number"]
        return int(found) % below

    def room(self) -> int:
        """Bytes that may still be added to this entry without leaving the disk, or the cache, too full."""
        try:
            free = shutil.disk_usage(self.folder).free - _SPARE
            return max(0, min(self.cache.limit - disk.bytes_in([self.folder]), free))
        except OSError:
            return 0

    def close(self) -> None:
        """Others may remove it from now on."""
        os.close(self._lock)


# --- files -------------------------------------------------------------------------------------------------------


def _moved(source: Path, target: Path) -> bool:
    """Give a folder another name, or copy it to another disk (False). OSError if it does not fit there."""
    try:
        source.rename(target)
        return True
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    if shutil.disk_usage(target.parent).free < sum(sealed.sizes(source).values()) + _SPARE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    for root, _, names in os.walk(source):
        inside = target / os.path.relpath(root, source)
        inside.mkdir(mode=0o700)
        for name in names:
            sealed.copy(Path(root, name), inside / name, source)
    return False


def _hashes(folder: Path) -> dict[str, FileHash]:
    """Of every file below a folder. InputError if anything there is neither a file nor a folder, such as a link."""
    files = []
    for root, folders, names in os.walk(folder, onerror=_raise):
        for name in (*folders, *names):
            mode = Path(root, name).lstat().st_mode
            if not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and name in folders)):
                raise InputError("a link, or not a file", where=Path(root, name))
        files += [Path(root, name) for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda path: sealed.hashed_once(path, folder, settled=True), files)
        return {p.relative_to(folder).as_posix(): h for p, h in zip(files, hashes, strict=True)}


def _raise(error: OSError) -> None:
    raise error


def _removed(path: Path) -> bool:
    """Take away a name at once, and what was under it after that."""
    gone = path.with_name(f"{_GONE}{secrets.token_hex(16)}")
    try:
        path.rename(gone)
    except OSError:
        return False
    _delete(gone)
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        disk.emptied(path)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
