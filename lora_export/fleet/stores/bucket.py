"""Requests to an object store, through obstore: its settings from the environment, its errors in words.

obstore's own messages are never shown: the answers of servers that they quote may hold the name of a key.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lora_export.errors import InputError, OutputError, RuntimeUnavailable, UnclearError
from lora_export.fleet.stores.files import AGAIN
from lora_export.storage.sealed import plain_path

if TYPE_CHECKING:
    import obstore.store

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "memory")
PART = 8 * 2**20  # bytes of a part of a large file
MOST_PARTS = 9000  # of one file; S3 takes 10,000
PARTS = 2  # parts of a file that are on their way at once
RETRIES, RETRY_SECONDS = 6, 120.0
CONNECT_SECONDS, SILENCE_SECONDS, REQUEST_SECONDS = 10.0, 60.0, 3600.0
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_FULL = frozenset({
    "QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "EntityTooLarge", "InsufficientCapacity",
    "XMinioAdminBucketQuotaExceeded", "ServerOverQuota",
})  # fmt: skip
_CREDENTIALS = ("PermissionDeniedError", "UnauthenticatedError", "PermissionError")
_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound", "InvalidBucketName"})
_METADATA_SERVICE = ("169.254.169.254", "metadata.google.internal", "169.254.170.2")
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_SETTINGS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION (for a profile, `aws configure "
    "export-credentials --format env` prints them), and AWS_ENDPOINT_URL for another server than Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}


@dataclass(frozen=True)
class Listed:
    """A file as a store lists it, below the bucket's prefix."""

    name: str
    size: int
    etag: str | None
    modified: datetime


@dataclass(frozen=True)
class Bucket:
    """A prefix of a bucket. Each method raises OutputError in words; `where` is its URL, without secrets."""

    where: str
    store: "obstore.store.ObjectStore"

    def get(self, name: str, etag: str | None = None) -> "obstore.GetResult | None":
        """None if there is none. etag: InputError for another version than this."""
        import obstore

        with self.errors():
            try:
                return obstore.get(self.store, name, options={"if_match": etag} if etag else None)
            except FileNotFoundError as error:
                if _code(error) in _NO_BUCKET:
                    raise
                return None
            except obstore.exceptions.PreconditionError:
                raise InputError(
                    "the file changed while it was read", where=f"{self.where}/{name}",
                    expected="files that nobody writes to meanwhile", next_step=AGAIN,
                ) from None  # fmt: skip

    def blocks(self, result: "obstore.GetResult") -> Iterator[bytes]:
        """The content of a file. UnclearError where it ends in the middle."""
        with self.errors(unclear=True):
            yield from result.stream(min_chunk_size=2**20)

    def put(self, name: str, content: bytes) -> None:
        import obstore

        with self.errors():
            obstore.put(self.store, name, content, use_multipart=False)

    def put_parts(self, name: str, size: int, blocks: Iterator[bytes]) -> None:
        """Write a large file of `size` bytes in parts, which obstore gives up after an error, also of `blocks`."""
        import obstore

        part = max(PART, -(-size // MOST_PARTS))
        with self.errors():
            obstore.put(self.store, name, blocks, use_multipart=True, chunk_size=part, max_concurrency=PARTS)

    def put_if(self, name: str, content: bytes, there: "obstore.GetResult | None") -> bool:
        """Write a file that does not exist, or over exactly the version that is `there`; False if it is another.
        UnclearError if the store does not say whether it did."""
        import obstore

        version = {k: v for k in ("e_tag", "version") if there is not None and (v := there.meta[k]) is not None}
        mode: Any = version if there is not None else "create"
        with self.errors(unclear=True):
            try:
                obstore.put(self.store, name, content, mode=mode, use_multipart=False)
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                return False
            except FileNotFoundError as error:
                if there is None or _code(error) in _NO_BUCKET:
                    raise
                return False
        return True

    def files(self, place: str) -> Iterator[Listed]:
        """Every file below a place ("": all), in no particular order."""
        import obstore

        with self.errors():
            for chunk in obstore.list(self.store, place or None, chunk_size=1000):
                for meta in chunk:
                    yield Listed(str(meta["path"]), meta["size"], meta["e_tag"], meta["last_modified"])

    def folders(self, place: str) -> list[str]:
        """The names of the folders in a place."""
        import obstore

        with self.errors():
            found = obstore.list_with_delimiter(self.store, place or None)["common_prefixes"]
        return sorted(str(one).rstrip("/").rpartition("/")[2] for one in found)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, also those that are not there."""
        import obstore

        every: Sequence[str] = sorted(names)
        with self.errors(), contextlib.suppress(FileNotFoundError):
            if every:
                obstore.delete(self.store, every)

    @contextlib.contextmanager
    def errors(self, *, unclear: bool = False) -> Iterator[None]:
        """OutputError in words for what a store refuses. unclear: UnclearError where there was no answer."""
        import obstore

        try:
            yield
        except (obstore.exceptions.BaseError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of a local file
            told, answered = _in_words(error, self.where)
            if unclear and not answered:
                raise UnclearError(told) from None
            raise told from None


def opened_bucket(url: str) -> Bucket:
    """The bucket and prefix of a URL. InputError for one that is no such store, or whose settings are missing."""
    where = checked_url(url)
    try:
        import obstore.exceptions
        from obstore.store import from_url
    except ImportError:
        raise RuntimeUnavailable(
            "object stores need obstore, which is not installed",
            where=where,
            next_step="pip install 'lora-export[fleet]'",
        ) from None
    if where.startswith("memory://"):
        return Bucket(where, _memory(where))
    try:
        store = from_url(
            where,
            client_options={
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "read_timeout": timedelta(seconds=SILENCE_SECONDS),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
                **({"allow_http": True} if _plain_http() else {}),
            },
            retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
        )
    except (obstore.exceptions.BaseError, ValueError):
        raise InputError(
            "the store cannot be opened with the settings in the environment", where=where, next_step=_set(where)
        ) from None
    return Bucket(where, store)


def checked_url(url: str) -> str:
    """The URL, in the one normal way. InputError for a scheme that is no store, and for one with secrets in it."""
    scheme, _, rest = url.partition("://")
    if scheme == "hf":
        raise InputError(
            "files on the Hub cannot be created only if they do not exist, which a root needs", where=_bare(url),
            expected=f"a folder, or one of {', '.join(SCHEMES[:4])}",
            next_step="a bucket of the Hub has an S3-compatible address: give it as s3://…, with AWS_ENDPOINT_URL",
        )  # fmt: skip
    if scheme not in SCHEMES:
        raise InputError(
            f"{scheme}:// is no store that objects can be kept in", where=_bare(url),
            expected=f"a folder, or one of {', '.join(SCHEMES[:4])}",
        )  # fmt: skip
    parts = urlsplit(url)
    if parts.query or parts.fragment or parts.password or (parts.username and scheme not in ("abfs", "abfss")):
        raise InputError(
            "a URL with a password, a query or a fragment", where=_bare(url),
            expected="credentials in the environment, where no record or report can show them",
        )  # fmt: skip
    path = rest.rstrip("/")
    if not plain_path(path):
        raise InputError(
            "a URL with an empty or special part", where=_bare(url), expected=f"{scheme}://BUCKET/PATH"
        )
    return f"{scheme}://{path}"


def _bare(url: str) -> str:
    """A URL without what could be a secret."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{re.split('[?#]', rest)[0].rpartition('@')[2]}"


@functools.cache
def _memory(where: str) -> "obstore.store.ObjectStore":
    """One for each URL, for as long as the process lives."""
    from obstore.store import MemoryStore

    return MemoryStore()


def _plain_http() -> bool:
    """Whether the address in the environment has no TLS, as the stores' own tools take it."""
    return any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)


def _set(where: str) -> str:
    scheme = where.partition("://")[0][:2]
    return f"set {_SETTINGS.get(scheme, _SETTINGS['az'])}"


def _code(error: Exception) -> str:
    found = _CODE.search(str(error))
    return found[1] if found else ""


def _in_words(error: Exception, where: str) -> tuple[OutputError, bool]:
    """What happened, and whether the store answered at all."""
    text, code = str(error), _code(error)
    matched = _STATUS.search(text)
    status = int(matched[1]) if matched else 0
    said = f" ({', '.join(str(s) for s in (status, code) if s)})" if status else ""
    if any(service in text for service in _METADATA_SERVICE):
        return OutputError("there are no credentials for the store", where=where, next_step=_set(where)), True
    for kind in _KINDS:
        if kind.of(error, status, code):
            cure = kind.cure.format(settings=_set(where))
            told = OutputError(kind.found + said, where=where, expected=kind.expected, next_step=f"{cure}{AGAIN}")
            return told, kind.answered
    return OutputError(f"the store refuses the request{said}", where=where, next_step=_set(where)), True


@dataclass(frozen=True)
class _Kind:
    """of: whether an error is of this kind, by itself, its status (0: none) and its code; cure: what comes before
    the next attempt; answered: the store did not carry the request out."""

    of: Callable[[Exception, int, str], bool]
    found: str
    expected: str
    cure: str
    answered: bool = True


_KINDS = (
    _Kind(
        lambda error, status, code: status in (401, 403) or type(error).__name__ in _CREDENTIALS,
        "the store refuses the credentials",
        "credentials that are valid, and may list, read, write and delete here",
        "{settings}; then ",
    ),
    _Kind(
        lambda error, status, code: code in _NO_BUCKET,
        "there is no such bucket",
        "a bucket that exists",
        "create it with the tools of the store, or correct the URL; then ",
    ),
    _Kind(
        lambda error, status, code: status == 507 or code in _FULL,
        "the store is full",
        "room for the whole object",
        "make room there; then ",
    ),
    _Kind(
        lambda error, status, code: status in (429, 503) or "Timeout" in str(error) or "TimedOut" in str(error),
        "the store is too slow",
        f"an answer within {SILENCE_SECONDS:g} s",
        "wait; then ",
        answered=False,
    ),
    _Kind(
        lambda error, status, code: status >= 500,
        "the store fails",
        "a store that works",
        "find out what is wrong there; then ",
        answered=False,
    ),
    _Kind(
        lambda error, status, code: type(error).__name__ == "InvalidPathError",
        "the store holds a file whose name has empty or special parts",
        "plain names, such as a/b.json",
        "rename it, or choose another place; then ",
    ),
    _Kind(
        lambda error, status, code: status == 0,
        "the store cannot be reached, or ended the connection",
        "a store that works, at the address that the environment names",
        "find out whether it can be reached; then ",
        answered=False,
    ),
)
