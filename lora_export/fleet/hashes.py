"""SHA-256 of the files of bases and adapters, kept in a cache of the user, so that a rerun reads none of them.

An entry holds for one path with the size, times, inode and device that its file had while it was read. A file that
was changed within two seconds before is not kept: it could be changed again without a sign of it.
"""

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.errors import InputError, LoraExportError
from lora_export.folder_files import SENTENCE_MODULES
from lora_export.storage.sealed import opened

_INDEX = "model_index.json"  # of a pipeline, whose models lie in folders
_SETTLED = 2 * 10**9  # nanoseconds
_PATIENCE = 10.0  # seconds that a writer waits for another one
_THREADS = min(8, os.cpu_count() or 1)
# Nothing of these is read: pickles, code, exports, and what a training leaves behind.
_UNREAD = frozenset(
    {
        ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".py", ".pyc", ".log", ".lock", ".tmp",
        ".incomplete", ".ot", ".tflite", ".distcp",
    }
)  # fmt: skip
_TABLE = (
    "CREATE TABLE IF NOT EXISTS hashes (path BLOB PRIMARY KEY, sign BLOB NOT NULL, sha256 BLOB NOT NULL) "
    "WITHOUT ROWID"
)

Found = Mapping[str, str] | LoraExportError  # name in the folder → SHA-256, or why there is none


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    path: str
    root: Path
    sign: bytes


def _sign(status: os.stat_result) -> bytes:
    """What changes when a file does."""
    parts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return " ".join(map(str, parts)).encode()


@dataclass
class Hashes:
    """Hashes of folders. cache: a file that many processes may use at once; None: none. read: bytes that had to be
    read."""

    cache: Path | None = None
    read: int = field(default=0, init=False)

    def of(self, place: Path) -> Mapping[str, str]:
        """Of one folder or file, as `of_all`. LoraExportError if it cannot be read."""
        found = self.of_all([place])[place]
        if isinstance(found, LoraExportError):
            raise found
        return found

    def of_all(self, places: Iterable[Path]) -> dict[Path, Found]:
        """Folder → name (with /) → SHA-256 of what is read of a base or an adapter; of a single file, whose name
        does not matter, under ''. A folder that cannot be read has its error."""
        each = list(dict.fromkeys(places))
        with ThreadPoolExecutor(_THREADS) as pool, self._opened() as kept:
            listed = list(pool.map(_listed, each))
            known = kept.get([f.path for files in listed if not isinstance(files, LoraExportError) for f in files])
            results: dict[Path, Found] = {}
            waiting: list[tuple[dict[str, str], Path, _File]] = []
            for place, files in zip(each, listed, strict=True):
                if isinstance(files, LoraExportError):
                    results[place] = files
                    continue
                here: dict[str, str] = {}
                results[place] = here
                for file in files:
                    sign, digest = known.get(file.path, (b"", ""))
                    here[file.name] = digest if sign == file.sign else ""
                    if sign != file.sign:
                        waiting.append((here, place, file))
            fresh: list[tuple[str, bytes, str]] = []
            for (here, place, file), made in zip(waiting, pool.map(_hashed, [w[2] for w in waiting]), strict=True):
                if isinstance(made, LoraExportError):
                    results[place] = made
                    continue
                sign, here[file.name], size = made
                self.read += size
                if sign:
                    fresh.append((file.path, sign, here[file.name]))
            kept.put(fresh)
        return results

    @contextlib.contextmanager
    def _opened(self) -> Iterator["_Kept"]:
        connection = None
        if self.cache is not None:
            with contextlib.suppress(OSError, sqlite3.Error):  # without a cache everything is read again
                self.cache.parent.mkdir(parents=True, exist_ok=True)
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

    def get(self, paths: Iterable[str]) -> dict[str, tuple[bytes, str]]:
        found: dict[str, tuple[bytes, str]] = {}
        if self.connection is None:
            return found
        with contextlib.suppress(sqlite3.Error):
            for path in paths:
                row = self.connection.execute(
                    "SELECT sign, sha256 FROM hashes WHERE path = ?", (os.fsencode(path),)
                ).fetchone()
                if row is not None and isinstance(row[1], bytes) and len(row[1]) == 32:
                    found[path] = bytes(row[0]), row[1].hex()
        return found

    def put(self, entries: list[tuple[str, bytes, str]]) -> None:
        if self.connection is None or not entries:
            return
        rows = [(os.fsencode(path), sign, bytes.fromhex(digest)) for path, sign, digest in entries]
        with contextlib.suppress(sqlite3.Error):
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", rows)
            self.connection.execute("COMMIT")


def _listed(place: Path) -> list[_File] | LoraExportError:
    """What is read of a base or an adapter: the folder's own files; all of a pipeline's, and of a model with
    modules in folders."""
    try:
        if place.is_file():
            path = str(place.absolute())
            return [_File("", path, place.parent, _sign(place.stat()))]
        if not place.is_dir():
            return InputError("there is no such folder", where=place, expected="a folder, or a .safetensors file")
        deep = (place / SENTENCE_MODULES).is_file() or (place / _INDEX).is_file()
        files = sorted(_below(str(place.absolute()), "", place, deep), key=lambda f: f.name)
    except OSError as error:
        return InputError(f"the folder cannot be read: {error.strerror}", where=error.filename or place)
    return files or InputError("the folder is empty", where=place, expected="the files of a model or an adapter")


def _below(folder: str, inside: str, root: Path, deep: bool) -> Iterator[_File]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or Path(entry.name).suffix.lower() in _UNREAD:
                continue
            name = f"{inside}{entry.name}"
            if entry.is_dir():
                if deep and not entry.is_symlink():
                    yield from _below(entry.path, f"{name}/", root, deep)
            else:
                yield _File(name, entry.path, root, _sign(entry.stat()))


def _hashed(file: _File) -> tuple[bytes, str, int] | LoraExportError:
    """(what it holds for, b"" if it may not be kept; SHA-256; bytes that were read)."""
    path = Path(file.path)
    try:
        with opened(path, file.root) as stream:
            before = os.fstat(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            after = os.fstat(stream.fileno())
    except LoraExportError as error:
        return error
    except OSError as error:
        return InputError(f"the file cannot be read: {error.strerror}", where=path)
    if _sign(before) != _sign(after):
        return InputError("the file changes while it is read", where=path, expected="a file that nobody writes")
    settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLED
    return _sign(after) if settled else b"", digest, after.st_size
