"""A root in an object store.

A store without renames cannot put many files at a place in one step. So every attempt to publish an object has a
folder of its own below the object's place, and record.json beside these, which names the attempt that counts, is
created last and only if there is none.
"""

import contextlib
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_export.contracts.fleet import Record, StoredFile
from lora_export.errors import InputError, OutputError, UnclearError
from lora_export.fleet.stores.attempts import attempt_name, give_up, given_up
from lora_export.fleet.stores.bucket import PART, Bucket, Listed, opened_bucket
from lora_export.fleet.stores.files import (
    Passing,
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
from lora_export.records import LARGEST, NAME, encoded, finished

if TYPE_CHECKING:
    import obstore

READERS = 32  # small files that are asked for at once
TRANSFERS = 4  # files of an object that are on their way at once
TRIES = 3  # of a download that ends in the middle, and of an object that was replaced meanwhile
PROBE = ".create-only"
_known: set[str] = set()  # roots whose store creates a file once, as this process has seen
T = TypeVar("T")
R = TypeVar("R")


class ObjectStore:
    """See `Store`. s3://, gs://, az:// and their relatives; memory://NAME lives as long as the process."""

    def __init__(self, url: str) -> None:
        self.bucket: Bucket = opened_bucket(url)
        self.where = self.bucket.where

    def read(self, name: str) -> bytes | None:
        found = self.bucket.get(checked_name(name, self.where))
        if found is None:
            return None
        if found.meta["size"] > LARGEST:
            raise InputError(f"a file of more than {LARGEST:,} bytes", where=f"{self.where}/{name}")
        return self._content(found)

    def create(self, name: str, content: bytes) -> bool:
        checked_name(name, self.where)
        self._refuse_unconditional()
        with _answered():
            return self._put_if(name, content)

    def replace(self, name: str, content: bytes) -> None:
        self.bucket.put(checked_name(name, self.where), content)

    def names(self, place: str) -> Iterator[str]:
        if place:
            checked_name(place, self.where)
        for one in self.bucket.files(place):
            if one.name != PROBE:
                yield one.name

    def records(self, place: str, only: Container[str] | None = None) -> Mapping[str, bytes]:
        keys = [k for k in self.bucket.folders(checked_name(place, self.where)) if only is None or k in only]
        raws = _at_once(READERS, self.read, [f"{place}/{key}/{NAME}" for key in keys])
        return {key: raw for key, raw in zip(keys, raws, strict=True) if raw is not None}

    def publish(self, folder: Path, place: str, record: Record, *, again: bool = False) -> bool:
        name = f"{checked_name(place, self.where)}/{NAME}"
        there = self.bucket.get(name)
        first = there is None or again
        old = b"" if there is None or not again else self._content(there)
        if first:
            self._refuse_unconditional()
            at = attempt_name()
            files = self._upload(folder, place, at)
            first = self._decide(name, encoded(finished(record, files, at)), there, at)
            with contextlib.suppress(OutputError):  # what is left over is told by `verify`
                if first:
                    self._sweep(place, at, old)
                else:
                    self.bucket.delete(self.names(f"{place}/{at}"))
        shutil.rmtree(folder, ignore_errors=True)
        return first

    def fetch(self, place: str, folder: Path) -> Record | None:
        for last in (False, False, True):
            raw = self.read(f"{place}/{NAME}")
            record = record_of(raw, f"{self.where}/{place}")
            if record is None:
                return None
            try:
                with disk_errors(str(folder), "the disk"), new_folder(folder) as stage:
                    self._download(record, f"{place}/{record.at}", stage)
                return record
            except InputError:
                if last or self.read(f"{place}/{NAME}") == raw:
                    raise
        return None

    def measure(self, name: str) -> StoredFile | None:
        return self._streamed(checked_name(name, self.where), hashed)

    def remove(self, place: str) -> None:
        names = list(self.names(checked_name(place, self.where)))
        self.bucket.delete([f"{place}/{NAME}"] if f"{place}/{NAME}" in names else [place])
        self.bucket.delete(names)

    def _content(self, found: "obstore.GetResult") -> bytes:
        with _answered():
            return b"".join(self.bucket.blocks(found))

    def _decide(self, name: str, content: bytes, there: "obstore.GetResult | None", at: str) -> bool:
        """Put an attempt's record in its place. After an error, or a signal, nobody can be sure that it is not
        there, or does not arrive later: so the attempt's files stay, until another one of the object is whole."""
        try:
            with _answered():
                return self._put_if(name, content, there)
        except BaseException:
            give_up(at)
            raise

    def _put_if(self, name: str, content: bytes, there: "obstore.GetResult | None" = None) -> bool:
        """Whether the file is there because of this call.

        A request whose answer is lost may have been carried out, also one that was sent again and refused then. So
        what is there is compared: nobody else writes a record of this attempt.
        """
        return self._attempted(name, content, there) or self.read(name) == content

    def _attempted(self, name: str, content: bytes, there: "obstore.GetResult | None") -> bool:
        """`Bucket.put_if`, a few times where the store does not say whether it did; then False may be wrong."""
        for _ in range(TRIES):
            try:
                return self.bucket.put_if(name, content, there)
            except UnclearError as unclear:
                error = unclear
        raise error

    def _refuse_unconditional(self) -> None:
        """OutputError for a store that writes over a file although it is asked not to: some do not know the header.
        Asked once by a process, with a file that stays."""
        if self.where in _known or self.where.startswith("memory://"):
            return
        with _answered():
            if self._attempted(PROBE, b"", None) and self._attempted(PROBE, b"", None):
                raise OutputError(
                    "the store writes over a file that it was asked to create only if there is none",
                    where=self.where,
                    expected="a store with conditional writes (If-None-Match); without them two writers could mix",
                    next_step="use another store, or a folder; of an S3-compatible server, a later version",
                )
        _known.add(self.where)

    def _upload(self, folder: Path, place: str, at: str) -> dict[str, StoredFile]:
        """Put a folder's files below PLACE/AT/, and remove them again after an error."""
        try:
            return self._uploaded(folder, f"{place}/{at}")
        except BaseException:
            give_up(at)
            with contextlib.suppress(OutputError):
                self.bucket.delete(self.names(f"{place}/{at}"))
            raise

    def _uploaded(self, folder: Path, attempt: str) -> dict[str, StoredFile]:
        paths = regular_files(folder)
        paths.pop(NAME, None)

        def one(name: str) -> StoredFile:
            size = paths[name].stat().st_size
            if size <= PART:
                content = paths[name].read_bytes()
                self.bucket.put(f"{attempt}/{name}", content)
                return hashed([content])
            with paths[name].open("rb", buffering=0) as file:
                passing = Passing(blocks_of(file))
                self.bucket.put_parts(f"{attempt}/{name}", size, passing)
                return passing.file

        with disk_errors(str(folder), "the disk"):
            return dict(zip(paths, _at_once(TRANSFERS, one, paths), strict=True))

    def _download(self, record: Record, at: str, stage: Path) -> None:
        def one(name: str) -> StoredFile | None:
            return self._streamed(f"{at}/{name}", partial(_again_to, stage / name))

        found = zip(record.files, _at_once(TRANSFERS, one, record.files), strict=True)
        wrong = next(differences(record.files, {n: file for n, file in found if file is not None}), None)
        if wrong is not None:
            raise changed(f"{self.where}/{at}", wrong)

    def _streamed(self, name: str, into: Callable[[Iterable[bytes]], StoredFile]) -> StoredFile | None:
        """A file, from its beginning again where a connection ends in its middle."""
        for _ in range(TRIES):
            found = self.bucket.get(name)
            if found is None:
                return None
            try:
                return into(self.bucket.blocks(found))
            except UnclearError as unclear:
                error = unclear.error
        raise error

    def _sweep(self, place: str, at: str, old: bytes) -> None:
        """Remove attempts at a place that were given up, and that of the record that was replaced."""
        files = list(self.bucket.files(place))
        now = max(one.modified for one in files)  # by the store's clock: the record was written just now
        attempts: dict[str, list[Listed]] = {}
        for one in files:
            attempt, slash, _ = one.name.removeprefix(f"{place}/").partition("/")
            if slash and attempt != at:
                attempts.setdefault(attempt, []).append(one)
        for attempt, parts in attempts.items():
            silent = now - max(one.modified for one in parts)
            if given_up(attempt, silent) or f'"{attempt}"'.encode() in old:
                self.bucket.delete(one.name for one in parts)


def _again_to(target: Path, blocks: Iterable[bytes]) -> StoredFile:
    target.unlink(missing_ok=True)
    return written(blocks, target)


def _at_once(most: int, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results in order, of a few calls at a time. The first error stops those that have not begun."""
    with ThreadPoolExecutor(most, "store") as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except UnclearError as unclear:
        raise unclear.error from None
