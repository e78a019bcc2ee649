"""Folders of adapters and bases in an object store or a bucket of the Hub, brought to a local cache once."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_export.errors import InputError, OutputError, UnclearError
from lora_export.fleet.stores.bucket import SCHEMES, Bucket, checked_url, opened_bucket
from lora_export.fleet.stores.files import disk_errors, written
from lora_export.fleet.stores.folder import put_folder
from lora_export.fleet.stores.writing import writing
from lora_export.storage.sealed import plain_path

TRANSFERS = 4  # files that are on their way at once
TRIES = 3  # of a file that ends in the middle
HUB = "hf://buckets/"


@dataclass(frozen=True)
class RemoteFile:
    """tag: changes with the content."""

    name: str
    size: int
    tag: str


Download = Callable[[Iterable[RemoteFile], Path], None]


def localized(url: str, cache: Path) -> Path:
    """The folder at a URL as a local one, named as there, which is brought into the cache if it is not there yet.

    It counts as the same for as long as names, sizes and ETags are the same. Several processes may ask at once, of
    which one wins. A killed one leaves nothing that counts. InputError for a URL without files, for names that lead
    out of the folder, and for what a store refuses.
    """
    try:
        if url.startswith(HUB):
            where, files, download = _of_hub(url)
        else:
            where, files, download = _of_store(url)
        _check(files, where)
        told = json.dumps([where, sorted((f.name, f.size, f.tag) for f in files)], ensure_ascii=True)
        kept = cache / hashlib.sha256(told.encode()).hexdigest()[:40]
        folder = kept / (PurePosixPath(where.partition("://")[2]).name)
        if not _whole(folder, files):
            with disk_errors(str(cache), "the disk"), writing(cache) as work:
                shutil.rmtree(kept, ignore_errors=True)
                download(files, work.path / folder.name)
                if not _whole(work.path / folder.name, files):
                    raise InputError("a file has another size than the store lists", where=where)
                put_folder(work.path, kept, False)
    except OutputError as error:
        raise InputError(error.found, where=error.where, next_step=error.next_step) from None
    return folder


def _check(files: list[RemoteFile], where: str) -> None:
    if not files:
        raise InputError("there are no files", where=where, expected="a folder with a model or an adapter")
    names = {f.name for f in files}
    for name in sorted(names):
        parents = {p.as_posix() for p in PurePosixPath(name).parents}
        if not plain_path(name) or parents & names:
            raise InputError(
                f"{name!r} cannot be a file in a folder", where=where, expected="plain names, such as a/b.json"
            )


def _whole(folder: Path, files: list[RemoteFile]) -> bool:
    """Whether a folder has these files, by their sizes."""
    try:
        return all((folder / f.name).lstat().st_size == f.size for f in files)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise


def _of_store(url: str) -> tuple[str, list[RemoteFile], Download]:
    if url.startswith("hf://"):
        raise InputError(
            "a model or an adapter of the Hub is named without hf://", where=url, expected="OWNER/NAME@COMMIT, "
            f"{HUB}OWNER/NAME/PATH, or one of {', '.join(SCHEMES[:4])}",
        )  # fmt: skip
    where = checked_url(url)
    bucket = opened_bucket(where)
    there = list(bucket.files(""))
    folders = {"", *(p.as_posix() for one in there for p in PurePosixPath(one.name).parents)}
    files = [
        RemoteFile(one.name, one.size, one.etag or one.modified.isoformat())
        for one in there
        if one.size or one.name not in folders  # some tools make a folder by an empty file of its name
    ]

    def download(wanted: Iterable[RemoteFile], folder: Path) -> None:
        with ThreadPoolExecutor(TRANSFERS, "inputs") as pool:
            list(pool.map(lambda one: _download(bucket, one, folder / one.name), wanted))

    return where, files, download


def _download(bucket: Bucket, one: RemoteFile, target: Path) -> None:
    for last in (False, False, True):
        found = bucket.get(one.name, one.tag if one.tag.startswith(('"', "W/")) else None)
        if found is None:
            raise InputError("the file was removed while the folder was read", where=f"{bucket.where}/{one.name}")
        try:
            target.unlink(missing_ok=True)
            written(bucket.blocks(found), target)
        except UnclearError as unclear:
            if last:
                raise unclear.error from None
        else:
            return


def _of_hub(url: str) -> tuple[str, list[RemoteFile], Download]:
    """hf://buckets/OWNER/NAME/PATH, with the token that huggingface_hub finds."""
    from huggingface_hub import BucketFile, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    where = url.rstrip("/")
    path = where.removeprefix(HUB)
    owner, name, *below = path.split("/")
    if not plain_path(path) or not below:
        raise InputError("not a folder of a bucket of the Hub", where=url, expected=f"{HUB}OWNER/NAME/PATH")
    bucket, prefix, hub = f"{owner}/{name}", "/".join(below), HfApi()
    try:
        there = [f for f in hub.list_bucket_tree(bucket, prefix, recursive=True) if isinstance(f, BucketFile)]
    except (HfHubHTTPError, OSError) as error:
        raise _of_the_hub(error, where) from None
    files = {f.path.removeprefix(f"{prefix}/"): f for f in there if f.path.startswith(f"{prefix}/")}

    def download(wanted: Iterable[RemoteFile], folder: Path) -> None:
        targets = [(files[one.name], folder / one.name) for one in wanted]
        for _, target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            hub.download_bucket_files(bucket, [*targets], raise_on_missing_files=True)
        except (HfHubHTTPError, ConnectionError) as error:
            raise _of_the_hub(error, where) from None

    return where, [RemoteFile(name, f.size, f.xet_hash) for name, f in files.items()], download


def _of_the_hub(error: Exception, where: str) -> InputError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return InputError(
        f"the Hub does not give the folder ({status or type(error).__name__})", where=where,
        expected="a bucket that this user's token can read", next_step="hf auth login",
    )  # fmt: skip
