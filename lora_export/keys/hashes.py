"""SHA-256 of the files of bases and adapters, kept in a cache of the user, so that a rerun reads none of them.

An entry holds for one path with the size, times, inode and device that its file had while it was read. A file that
was changed within two seconds before is not kept: it could be changed again without a sign of it.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lora_export import folder_files
from lora_export.errors import InputError, LoraExportError
from lora_export.folder_files import SENTENCE_MODULES
from lora_export.storage.documents import is_text
from lora_export.storage.sealed import SETTLED, opened, status_sign

T = TypeVar("T")

NAME = "hashes.sqlite"
_INDEX = "model_index.json"  # of a pipeline, whose models lie in folders
_PATIENCE = 10.0  # seconds that a writer waits for another one
_THREADS = min(8, os.cpu_count() or 1)
_LARGE = 2**23  # bytes of a file that is a job of its own
_TOGETHER = 64  # small files, or folders, of one job
_LARGEST = 2**29  # bytes of the cache; a larger one is begun anew
_MOST_HEADER = 100_000_000  # bytes, as the format says
# Nothing of these is read: pickles, code, exports, and what a training leaves behind.
_UNREAD = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".py", ".pyc", ".log", ".lock", ".tmp",
    ".incomplete", ".ot", ".tflite", ".distcp",
)  # fmt: skip
_TABLE = (
    "CREATE TABLE IF NOT EXISTS hashes (path BLOB PRIMARY KEY, sign BLOB NOT NULL, sha256 BLOB NOT NULL, "
    "head BLOB NOT NULL) WITHOUT ROWID"
)


@dataclass(frozen=True)
class Contents:
    """What is read of a base or an adapter. files: name (with /) → SHA-256; of a single file, whose name does not
    matter, under ''. form: the same for folders that differ in nothing but the numbers of their tensors."""

    files: Mapping[str, str]
    form: str


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    path: str
    root: Path
    status: os.stat_result
    linked: bool  # or in a folder of the folder: opened step by step

    @property
    def sign(self) -> bytes:
        return status_sign(self.status)


@dataclass(frozen=True, slots=True)
class _Listed:
    """unread: names of what else is there; links: paths of those, with which a form is its own."""

    files: list[_File]
    unread: list[str]
    links: list[str]


@dataclass(frozen=True, slots=True)
class _Hash:
    """sign: of the file that it holds for, b"" if it may not be kept; head: of a header of safetensors, or ''."""

    sign: bytes
    sha256: str
    head: str


def user_cache() -> Path:
    """Where hashes of files are kept for this user."""
    return folder_files.user_cache() / NAME


@dataclass
class Hashes:
    """Hashes of folders. cache: a file that many processes may use at once; None: none. read: bytes that had to be
    read."""

    cache: Path | None = field(default_factory=user_cache)
    read: int = field(default=0, init=False)

    def of(self, place: Path) -> Mapping[str, str]:
        """The files of one folder or file. LoraExportError if it cannot be read."""
        found = self.of_all([place])[place]
        if isinstance(found, LoraExportError):
            raise found
        return found.files

    def of_all(
        self, places: Iterable[Path], advance: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[Path, Contents | LoraExportError]:
        """Of each folder or file, or why it cannot be read. advance: receives bytes that were read, and that will
        be."""
        each = list(dict.fromkeys(places))
        with ThreadPoolExecutor(_THREADS) as pool, self._opened() as kept:
            chunks = pool.map(_all_listed, _chunks(each))
            listed = dict(zip(each, itertools.chain.from_iterable(chunks), strict=True))
            files = [f for one in listed.values() if isinstance(one, _Listed) for f in one.files]
            known = kept.get(files)
            missing = [f for f in files if f.path not in known]
            done, total = 0, sum(f.status.st_size for f in missing)
            self.read += total
            large = [[f] for f in missing if f.status.st_size >= _LARGE]
            small = _chunks([f for f in missing if f.status.st_size < _LARGE])
            made: dict[str, _Hash | LoraExportError] = {}
            for part, hashes in zip([*large, *small], pool.map(_all_hashed, [*large, *small]), strict=True):
                made |= {file.path: one for file, one in zip(part, hashes, strict=True)}
                done += sum(f.status.st_size for f in part)
                advance(done, total)
            kept.put([(path, one) for path, one in made.items() if isinstance(one, _Hash) and one.sign])
        found = known | made
        return {p: one if isinstance(one, LoraExportError) else _contents(one, found) for p, one in listed.items()}

    @contextlib.contextmanager
    def _opened(self) -> Iterator["_Kept"]:
        connection = None
        if self.cache is not None:
            with contextlib.suppress(OSError, sqlite3.Error):  # without a cache everything is read again
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                if self.cache.is_file() and self.cache.stat().st_size > _LARGEST:
                    self.cache.unlink()
                connection = sqlite3.connect(self.cache, timeout=_PATIENCE, isolation_level=None)
                connection.execute(_TABLE)
        try:
            yield _Kept(connection)
        finally:
            if connection is not None:
                connection.close()


@dataclass(frozen=True)
class _Kept:
    """The cache, or none. What cannot be read or written is as if it were not there: hashes are made again."""

    connection: sqlite3.Connection | None

    def get(self, files: Iterable[_File]) -> dict[str, "_Hash | LoraExportError"]:
        found: dict[str, _Hash | LoraExportError] = {}
        if self.connection is None:
            return found
        ask = "SELECT sha256, head FROM hashes WHERE path = ? AND sign = ?"
        with contextlib.suppress(sqlite3.Error, TypeError, AttributeError):
            for file in files:
                row = self.connection.execute(ask, (os.fsencode(file.path), file.sign)).fetchone()
                if row is not None and len(row[0]) == 32:
                    found[file.path] = _Hash(file.sign, row[0].hex(), row[1].hex())
        return found

    def put(self, entries: Sequence[tuple[str, _Hash]]) -> None:
        if self.connection is None or not entries:
            return
        rows = [
            (os.fsencode(path), one.sign, bytes.fromhex(one.sha256), bytes.fromhex(one.head))
            for path, one in entries
        ]
        with contextlib.suppress(sqlite3.Error):
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", rows)
            self.connection.execute("COMMIT")


def _chunks(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[at : at + _TOGETHER] for at in range(0, len(items), _TOGETHER)]


def _contents(listed: _Listed, found: Mapping[str, _Hash | LoraExportError]) -> Contents | LoraExportError:
    files: dict[str, str] = {}
    form: list[object] = [sorted(listed.links), sorted(listed.unread)]
    for file in listed.files:
        one = found[file.path]
        if isinstance(one, LoraExportError):
            return one
        files[file.name] = one.sha256
        form.append((file.name, file.status.st_size, one.head or one.sha256))
    return Contents(files, hashlib.sha256(json.dumps(form).encode()).hexdigest())


# --- folders -----------------------------------------------------------------------------------------------------


def _all_listed(places: Sequence[Path]) -> list[_Listed | LoraExportError]:
    return [_listed(place) for place in places]


def _listed(place: Path) -> _Listed | LoraExportError:
    """What is read of a base or an adapter: the folder's own files; all of a pipeline's, and of a model with
    modules in folders."""
    listed = _Listed([], [], [])
    try:
        folders = _add(listed, str(place.absolute()), "", place)
        names = {file.name for file in listed.files}
        while folders and (SENTENCE_MODULES in names or _INDEX in names):
            folders += _add(listed, *folders.pop(), place)
    except NotADirectoryError:
        return _Listed([_File("", str(place.absolute()), place.parent, place.stat(), True)], [], [])
    except FileNotFoundError as error:
        if error.filename not in (None, str(place.absolute())):
            return InputError("a link that leads nowhere", where=error.filename, expected="the file itself")
        return InputError("there is no such folder", where=place, expected="a folder, or a .safetensors file")
    except LoraExportError as error:
        return error
    except OSError as error:
        return InputError(f"the folder cannot be read: {error.strerror}", where=error.filename or place)
    if not listed.files:
        return InputError("the folder is empty", where=place, expected="the files of a model or an adapter")
    listed.files.sort(key=lambda f: f.name)
    return listed


def _add(listed: _Listed, folder: str, inside: str, root: Path) -> list[tuple[str, str]]:
    """Gather the files of one folder; its folders, each with its name."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{inside}{entry.name}"
            if entry.name.startswith("."):
                continue
            if not is_text(name):
                raise InputError("the name of a file is not UTF-8", where=entry.path, next_step="rename the file")
            if entry.is_symlink():
                listed.links.append(entry.path)
            if entry.is_dir():
                listed.unread.append(f"{name}/")
                if not entry.is_symlink():
                    folders.append((entry.path, f"{name}/"))
            elif entry.name.lower().endswith(_UNREAD):
                listed.unread.append(name)
            else:
                plain = not inside and not entry.is_symlink()
                listed.files.append(_File(name, entry.path, root, entry.stat(), not plain))
    return folders


# --- files -------------------------------------------------------------------------------------------------------


def _all_hashed(files: Sequence[_File]) -> list[_Hash | LoraExportError]:
    return [_hashed(file) for file in files]


def _hashed(file: _File) -> _Hash | LoraExportError:
    try:
        with _opened_once(file) as stream:
            before = os.fstat(stream.fileno())
            if not stat.S_ISREG(before.st_mode):
                return InputError("not a regular file", where=file.path, expected="a file that can be read again")
            head = _header(stream) if file.path.endswith(".safetensors") else ""
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            after = os.fstat(stream.fileno())
    except LoraExportError as error:
        return error
    except OSError as error:
        return InputError(f"the file cannot be read: {error.strerror}", where=file.path)
    if status_sign(before) != status_sign(after):
        return InputError(
            "the file changes while it is read", where=file.path, expected="a file that nobody writes"
        )
    settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > SETTLED
    return _Hash(status_sign(after) if settled else b"", digest, head)


def _opened_once(file: _File) -> contextlib.AbstractContextManager[io.BufferedReader]:
    """The file, open for reading. A link that has come since the folder was listed is not followed."""
    if file.linked:
        return opened(Path(file.path), file.root)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(file.path, flags), "rb")


def _header(stream: io.BufferedReader) -> str:
    """The SHA-256 of the header of a safetensors file; the stream is at its start again."""
    length = int.from_bytes(stream.read(8), "little")
    head = stream.read(length) if length <= _MOST_HEADER else b""
    stream.seek(0)
    return hashlib.sha256(head).hexdigest()
