"""record.json of an object: sealed with its own SHA-256, and checked by the bytes alone."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from lora_export.contracts.fleet import Record, StoredFile
from lora_export.errors import InputError
from lora_export.storage.documents import as_json, decode, parse_json
from lora_export.storage.sealed import json_text, plain_path
from lora_export.version import __version__

NAME = "record.json"
SCHEMA_VERSION = 1
LARGEST = 64 * 2**20  # bytes of a record, and of any other small file of a root
_END = b"\n}\n"
_SEAL = re.compile(rb',\n  "digest": "([0-9a-f]{64})"\n\}\n\Z')
_SEAL_LENGTH = len(b',\n  "digest": ""\n}\n') + 64


def encoded(record: Record) -> bytes:
    """The text of record.json, with the SHA-256 of the same text without it as the last field."""
    value = as_json(record)
    digest = hashlib.sha256(json_text(value).encode()).hexdigest()
    return json_text({**value, "digest": digest}).encode()


def decoded(raw: bytes, where: str) -> Record:
    """What `encoded` spelled. InputError if a byte was changed, for another version's form, and for a file's name
    that leads out of its folder. where: for the message."""
    seal = _SEAL.search(raw, max(0, len(raw) - _SEAL_LENGTH))
    if seal is None or hashlib.sha256(raw[: seal.start()] + _END).hexdigest().encode() != seal[1]:
        raise InputError(
            "the record was changed after it was written, or only a part of it was: it does not match its digest",
            where=where,
            expected="record.json as this tool wrote it",
            next_step="remove the folder that it lies in; the next run of the fleet makes it again",
        )
    try:
        value = parse_json(raw, len(raw))
    except ValueError as error:
        raise InputError(f"the record is not valid JSON: {error}", where=where) from None
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        found = value.get("schema_version") if isinstance(value, dict) else None
        raise InputError(
            f"the record is of version {found}", where=where, expected=f"version {SCHEMA_VERSION}",
            next_step="use the version of lora-export that wrote it, or another root",
        )  # fmt: skip
    record = decode(value, Record, "the record", where)
    odd = next((name for name in (*record.files, record.at or "a") if not plain_path(name)), None)
    if odd is not None:
        raise InputError("the record names a file outside its folder", where=where, tensor=odd)
    return record


def finished(record: Record, files: Mapping[str, StoredFile], at: str = "") -> Record:
    """The record as a store writes it: with the files that lie there, the time, and this tool's version."""
    return replace(
        record,
        schema_version=SCHEMA_VERSION,
        files=dict(sorted(files.items())),
        at=at,
        created=record.created or datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=record.tool_version or __version__,
    )
