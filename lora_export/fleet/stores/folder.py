"""A root in a folder of a disk, also one that several machines share.

Everything is written below ROOT/.writing first and gets its name in one step: a file by a hard link (create) or a
rename (replace), an object by renaming its whole folder. `rename` puts no folder over one that has files, so of
several writers one wins, and the others find out.
"""

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_export.contracts.fleet import Record, StoredFile
from lora_export.errors import InputError
from lora_export.fleet.stores.files import (
    blocks_of,
    changed,
    checked_name,
    differences,
    disk_errors,
    hashed,
    new_folder,
    record_of,
    regular_files,
    written,
)
from lora_export.fleet.stores.writing import FOLDER, Writing, writing
from lora_export.records import LARGEST, NAME, encoded, finished
from lora_export.storage import disk, sealed

READERS = 8  # threads that read records: a network file system answers them together
READ = 64  # records that one reads before it takes others
CLAIM = 30.0  # seconds after which the claim of a killed process does not count
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL})
_NO_FOLDER = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})


class FolderStore:
    """See `Store`. An object is moved, not copied, where the caller's folder lies on the same file system."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.where = str(root)
        if os.path.lexists(self.root) and not self.root.is_dir():
            raise InputError("the root of a fleet is not a folder", where=root, expected="a folder, or nothing")

    def read(self, name: str) -> bytes | None:
        path = self._path(name)
        with disk_errors(self.where):
            try:
                with sealed.opened(path, self.root) as file:
                    raw = file.read(LARGEST + 1)
            except FileNotFoundError:
                return None
        if len(raw) > LARGEST:
            raise InputError(f"a file of more than {LARGEST:,} bytes", where=path)
        return raw

    def create(self, name: str, content: bytes) -> bool:
        path = self._path(name)
        if os.path.lexists(path):
            return False
        with self._writing() as work:
            _write(work.path, content)
            self._make_parents(path)
            try:
                os.link(work.path, path, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if not _renamed_to_free(work, path):
                    return False
            disk.sync(path.parent)
        return True

    def replace(self, name: str, content: bytes) -> None:
        path = self._path(name)
        with self._writing() as work:
            _write(work.path, content)
            self._make_parents(path)
            work.path.replace(path)
            disk.sync(path.parent)

    def names(self, place: str) -> Iterator[str]:
        folder = self.root / checked_name(place, self.where) if place else self.root
        for root, folders, files in os.walk(folder):
            below = Path(root).relative_to(self.root)
            folders[:] = sorted(f for f in folders if (root, f) != (str(self.root), FOLDER))
            links = [f for f in folders if Path(root, f).is_symlink()]
            for name in sorted((*files, *links)):
                yield (below / name).as_posix()

    def records(self, place: str, only: Container[str] | None = None) -> Mapping[str, bytes]:
        folder = self._path(f"{checked_name(place, self.where)}/KEY").parent
        with disk_errors(self.where):
            try:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                return {}
            try:
                with os.scandir(fd) as entries:
                    keys = sorted(e.name for e in entries if only is None or e.name in only)
                parts = [keys[i : i + READ] for i in range(0, len(keys), READ)]
                with ThreadPoolExecutor(READERS, "records") as pool:
                    found = pool.map(lambda part: [(key, _record_in(fd, key)) for key in part], parts)
                    return {key: raw for part in found for key, raw in part if raw is not None}
            finally:
                os.close(fd)

    def publish(self, folder: Path, place: str, record: Record, *, again: bool = False) -> bool:
        path = self._path(place)
        there = self.read(f"{place}/{NAME}")
        first = again or there is None
        if first:
            with self._writing() as work:
                with _moved(folder, work) as moved:
                    files = _files(work, record.files) if moved else _copies(folder, work)
                    first = self._publish(files, work, path, record, there)
                disk.sync(path.parent)
        shutil.rmtree(folder, ignore_errors=True)
        return first

    def _publish(
        self, files: dict[str, StoredFile], work: Writing, path: Path, record: Record, there: bytes | None
    ) -> bool:
        files.pop(NAME, None)
        work.path.joinpath(NAME).unlink(missing_ok=True)
        _write(work.path / NAME, encoded(finished(record, files)))
        disk.sync_tree(work.path)
        self._make_parents(path)
        if there is not None and self.read(f"{path.relative_to(self.root).as_posix()}/{NAME}") not in (there, None):
            return False  # another one took the same object's place meanwhile
        return put_folder(work.path, path, there is not None)

    def fetch(self, place: str, folder: Path) -> Record | None:
        path = self._path(place)
        record = record_of(self.read(f"{place}/{NAME}"), str(path))
        if record is None:
            return None
        with disk_errors(str(folder), "the disk"), new_folder(folder) as stage:
            there: dict[str, StoredFile] = {}
            for name in record.files:
                source = path / record.at / name
                try:
                    with sealed.opened(source, self.root) as file:
                        there[name] = written(blocks_of(file), stage / name)
                except FileNotFoundError:
                    break  # missing, which is said below
            wrong = next(differences(record.files, there), None)
            if wrong is not None:
                raise changed(str(path), wrong)
        return record

    def measure(self, name: str) -> StoredFile | None:
        path = self._path(name)
        with disk_errors(self.where):
            try:
                with sealed.opened(path, self.root) as file:
                    return hashed(blocks_of(file))
            except FileNotFoundError:
                return None

    def remove(self, place: str) -> None:
        path = self._path(place)
        if not os.path.lexists(path):
            return
        with self._writing() as work, contextlib.suppress(FileNotFoundError):
            path.rename(work.path)  # gone in one step, also where it has many files
            disk.sync(path.parent)

    def _path(self, name: str) -> Path:
        """The path of a name. InputError if it, or a link on its way, leads out of the root."""
        path = self.root / checked_name(name, self.where)
        if name.split("/", 1)[0] == FOLDER:
            raise InputError("this folder of a root is for work in progress", where=path)
        if path.parent != self.root and not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise InputError(
                "a link in the root leads out of it", where=path.parent, expected="a folder within the root",
                next_step="replace the link by the folder that it leads to",
            )  # fmt: skip
        return path

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Writing]:
        with disk_errors(self.where), writing(self.root) as work:
            yield work

    def _make_parents(self, path: Path) -> None:
        missing = [p for p in path.parents if not p.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in missing:
            disk.sync(parent.parent)


def _record_in(place: int, key: str) -> bytes | None:
    """The record of an object by a descriptor of its place; None for what is no folder, or has none. Links are not
    followed. A network file system answers the few calls that this takes quickly."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        folder = os.open(key, flags | os.O_DIRECTORY, dir_fd=place)
    except OSError as error:
        if error.errno in _NO_FOLDER:
            return None
        raise
    try:
        with os.fdopen(os.open(NAME, flags, dir_fd=folder), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            return file.read() if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST else None
    except OSError as error:
        if error.errno in _NO_FOLDER:
            return None
        raise
    finally:
        os.close(folder)


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        disk.write_at(fd, content, 0)
        os.fsync(fd)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def _moved(folder: Path, work: Writing) -> Iterator[bool]:
    """Move a folder into the root, if it lies on the same file system and nothing else names its files; after an
    error it goes back, so that its owner may try again."""
    shared = any(p.lstat().st_nlink > 1 for p in regular_files(folder).values())
    inode = folder.lstat().st_ino
    try:
        if not shared:
            folder.rename(work.path)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES):
            raise
        shared = True
    try:
        yield not shared
    except BaseException:
        with contextlib.suppress(OSError):
            if not shared and work.path.lstat().st_ino == inode:  # and not what it took the place of
                work.path.joinpath(NAME).unlink(missing_ok=True)
                work.path.rename(folder)
        raise


def _files(work: Writing, known: Mapping[str, StoredFile]) -> dict[str, StoredFile]:
    """known: what the caller has hashed itself, in the folder that is his alone."""
    files = {}
    for name, path in regular_files(work.path).items():
        if name in known and known[name].bytes == path.lstat().st_size:
            files[name] = known[name]
            continue
        with path.open("rb", buffering=0) as file:
            files[name] = hashed(blocks_of(file), work.alive)
    return files


def _copies(folder: Path, work: Writing) -> dict[str, StoredFile]:
    sources = regular_files(folder)
    needed = sum(p.lstat().st_size for p in sources.values())
    free = shutil.disk_usage(work.path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work.path.parent))
    work.path.mkdir()
    files = {}
    for name, path in sources.items():
        with path.open("rb", buffering=0) as source:
            files[name] = written(blocks_of(source), work.path / name, work.alive)
    return files


def put_folder(stage: Path, path: Path, again: bool) -> bool:
    """Rename a folder to a name that is free; or, with `again`, exchange it with what has the name."""
    while True:
        try:
            stage.rename(path)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        else:
            return True
        if not again:
            return False
        with contextlib.suppress(FileNotFoundError):  # somebody removed it meanwhile
            if not disk.exchange_names(stage, path):
                old = stage.with_name(f"{stage.name}.old")  # as `clean` knows it
                path.rename(old)
                try:
                    stage.rename(path)
                finally:
                    shutil.rmtree(old, ignore_errors=True)
            return True


def _renamed_to_free(work: Writing, path: Path) -> bool:
    """`os.link` for file systems that have none: whoever creates the claim looks and renames, one at a time."""
    claim = work.lock.with_name(f"{path.name}.claim")
    while True:
        try:
            os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            os.utime(work.fd)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(work.fd).st_mtime - claim.lstat().st_mtime > CLAIM:
                    claim.unlink()
            time.sleep(0.01)
            continue
        try:
            if os.path.lexists(path):
                return False
            work.path.rename(path)
            return True
        finally:
            claim.unlink(missing_ok=True)
