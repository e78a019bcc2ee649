"""What a fleet asks of the place that its objects lie in."""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from lora_export.contracts.fleet import Record, StoredFile


class Store(Protocol):
    """A root. Names are relative, with slashes. OutputError, with what to do, for a store that is full, slow beyond
    its time, or refuses its credentials; the caller has lost nothing then and may try again."""

    where: str  # folder or URL, without secrets

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None if there is none."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that does not exist, in one step; False if it exists. An object store says True as well
        where exactly these bytes are there: it cannot tell them from its own, when an answer was lost."""

    def replace(self, name: str, content: bytes) -> None:
        """Write a file in one step, over another or not."""

    def names(self, place: str) -> Iterator[str]:
        """Every file below a folder ("": of the root), with the folder, in no particular order."""

    def records(self, place: str, only: Container[str] | None = None) -> Mapping[str, bytes]:
        """KEY → record.json of every PLACE/KEY/, in as few requests as the store allows. only: keys that matter, of
        all that a root has gathered."""

    def publish(self, folder: Path, place: str, record: Record, *, again: bool = False) -> bool:
        """Put a local folder at PLACE, its record last; False if another writer was first, whose object stays as it
        is. again: take the place of an object that is there (a verdict), in one step. The record's `files`, `at`,
        `created` and `tool_version` are set here. The local folder is consumed, and kept where this raises. What
        killed writers left is removed on the way."""

    def fetch(self, place: str, folder: Path) -> Record | None:
        """Bring an object into a new local folder, each file compared with its record; None if there is none.
        InputError for one that was changed."""

    def measure(self, name: str) -> StoredFile | None:
        """Size and SHA-256 of a file, which is read for it as a whole; None if there is none."""

    def remove(self, place: str) -> None:
        """An object with all its files, or a file; nothing if there is none."""


def opened(root: str) -> Store:
    """The store at a folder or URL (s3://, gs://, az://…; file:// is a folder). InputError for one that cannot be,
    RuntimeUnavailable without the library for it. Nothing is written, or asked of a store."""
    root = root.removeprefix("file://")
    if "://" in root:
        from lora_export.fleet.stores.objects import ObjectStore

        return ObjectStore(root)
    from lora_export.fleet.stores.folder import FolderStore

    return FolderStore(Path(root))
