"""Objects for the tests of stores: folders whose bytes say who wrote them, and what lies in a root."""

import hashlib
import secrets
from pathlib import Path

from lora_export.contracts import Record, RowOutcome
from lora_export.fleet.stores import Store
from lora_export.records import SCHEMA_VERSION, decoded

KEY = "ab" * 32
PLACE = f"objects/{KEY}"
SIZES = {"merged/model.bin": 3_000, "merged/config.json": 20, "onnx/model.onnx": 1_500, "empty": 0}


def record(writer: str, key: str = KEY) -> Record:
    return Record(SCHEMA_VERSION, key, {"base": {}}, RowOutcome("acme", key, "done", worker=writer), {})


def content(writer: str, name: str, size: int) -> bytes:
    """Bytes that differ for each writer and each file."""
    seed = hashlib.sha256(f"{writer} {name}".encode()).digest()
    return (seed * (size // len(seed) + 1))[:size]


def made(folder: Path, writer: str, sizes: dict[str, int] | None = None) -> Path:
    """A folder with the files of a writer."""
    for name, size in (sizes or SIZES).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(writer, name, size))
    return folder


def writer_of(store: Store, place: str, scratch: Path, sizes: dict[str, int] | None = None) -> str:
    """Whose object lies at a place. AssertionError if a byte of it is another one's."""
    raw = store.read(f"{place}/record.json")
    assert raw is not None
    found = decoded(raw, place)
    folder = scratch / f"fetched-{secrets.token_hex(8)}"
    assert store.fetch(place, folder) == found
    writer = found.outcome.worker
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files == {name: content(writer, name, size) for name, size in (sizes or SIZES).items()}
    return writer
