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
from lora_export.errors import InputError, OutputError
from lora_export.fleet.records import LARGEST, NAME, encoded, finished
from lora_export.fleet.stores.attempts import attempt_name, give_up, given_up
from lora_export.fleet.stores.bucket import PART, Bucket, Listed, UnclearError, opened_bucket
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

if TYPE_CHECKING:
    from obstore import GetResult

READERS = 32  # small files that are asked for at once
TRANSFERS = 4  # files of an object that are on their way at once
TRIES = 3  # of a download that ends in the middle, and of an object that was replaced meanwhile
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
        with _answered():
            return self._put_if(checked_name(name, self.where), content)

    def replace(self, name: str, content: bytes) -> None:
        self.bucket.put(checked_name(name, self.where), content)

    def names(self, place: str) -> Iterator[str]:
        if place:
            checked_name(place, self.where)
        for one in self.bucket.files(place):
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
            at = attempt_name()
            with self._given_up(place, at):
                files = self._upload(folder, f"{place}/{at}")
                first = self._put_if(name, encoded(finished(record, files, at)), there)
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
                with disk_errors(str(folder)), new_folder(folder) as stage:
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

    def _content(self, found: "GetResult") -> bytes:
        with _answered():
            return b"".join(self.bucket.blocks(found))

    def _put_if(self, name: str, content: bytes, there: "GetResult | None" = None) -> bool:
        """Whether the file is there because of this call. UnclearError if the store does not say.

        A request whose answer is lost may have been carried out, also one that was sent again and refused then. So
        what is there is compared: nobody else writes a record of this attempt.
        """
        for last in (False, False, True):
            try:
                return self.bucket.put_if(name, content, there) or self.read(name) == content
            except UnclearError:
                with contextlib.suppress(OutputError):
                    found = self.read(name)
                    if found == content or (found is not None and there is None):
                        return found == content
                if last:
                    raise
        raise AssertionError  # not reached

    @contextlib.contextmanager
    def _given_up(self, place: str, at: str) -> Iterator[None]:
        """Remove an attempt after an error; but not yet where its record may still arrive."""
        try:
            yield
        except UnclearError as unclear:
            give_up(at)
            raise unclear.error from None
        except BaseException:
            give_up(at)
            with contextlib.suppress(OutputError):
                self.bucket.delete(self.names(f"{place}/{at}"))
            raise

    def _upload(self, folder: Path, attempt: str) -> dict[str, StoredFile]:
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

        with disk_errors(str(folder)):
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
