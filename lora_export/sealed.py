"""Files that are read with distrust: JSON within bounds, documents sealed by a digest, hashes, plain names."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lora_export.documents import finite, is_text
from lora_export.errors import InputError


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Name (relative, with /), SHA-256 and size in bytes of every file below `folder`, sorted."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashed(p) for p in paths}


def sizes(folder: Path) -> dict[str, int]:
    """Name (relative, with /) and size in bytes of every file below `folder`, sorted."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}


def hashed(path: Path) -> dict[str, Any]:
    """SHA-256 and size in bytes of a file."""
    return {"sha256": sha256(path), "size": path.stat().st_size}


def read_json(path: Path, *, limit: int = 256 * 2**20) -> dict[str, Any]:
    """The JSON object in a file; anything else is an InputError that names it. `limit` is in bytes."""
    try:
        refuse_outward_link(path)
        if path.stat().st_size > limit:
            raise InputError(f"a JSON file of more than {limit} bytes", where=path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"the file is not valid JSON: {error}", where=path) from None
    if not isinstance(value, dict):
        raise InputError("the file holds no JSON object", where=path, expected="{…}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: Mapping[str, Any]) -> str:
    """As every JSON document of this tool is written: one document, one text, "nan" and "inf" as words."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if not is_text(text):
        raise InputError(
            "a name that is no UTF-8, which JSON cannot hold",
            expected="files and folders with names in UTF-8",
            next_step="rename what lies in the folders that were given",
        )
    return text


def write_settings(path: Path, value: Mapping[str, Any]) -> None:
    """A model's own configuration, in which its libraries read NaN and Infinity as numbers."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file with a `digest`: the SHA-256 of the same file without it."""
    write_json(path, {**value, "digest": _digest(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the digest. InputError if a byte of the file is not as it was written."""
    value = read_json(path)
    try:
        text = path.read_bytes().decode("utf-8")  # as text, \r would read as \n
    except (OSError, ValueError) as error:
        raise InputError(f"the file cannot be read: {error}", where=path) from None
    digest = value.pop("digest", None)
    try:
        whole = digest == _digest(value) and text == json_text({**value, "digest": digest})
    except (ValueError, InputError):  # half a character, which no file can hold
        whole = False
    if not whole:
        raise InputError(
            "the file was changed after it was written: it does not agree with its own digest",
            where=path,
            expected="the file as this tool wrote it",
            next_step="take it from where it was made",
        )
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(value).encode()).hexdigest()


def plain_name(name: str) -> bool:
    """Whether a file name that came with a model stays inside its folder."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\\0:")


def plain_path(name: str) -> bool:
    """Whether a name with / that came with a model stays inside its folder, and is spelled as it always is."""
    path = PurePosixPath(name)
    return bool(path.parts) and path.as_posix() == name and all(map(plain_name, path.parts))


def refuse_outward_link(path: Path) -> None:
    """A link in a model's folder may lead to a file of that folder, or to the blobs of the hub cache that it is in.

    Any other link would have this process read, and copy into its output, a file that did not come with the model.
    """
    if not path.is_symlink():
        return
    target, folder = path.resolve(), path.parent.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(home in target.parents for home in homes):
        raise InputError(
            "a link that leads out of the folder",
            where=path,
            expected="a file, or a link within the folder or into the blobs of a hub cache",
            next_step="copy the file itself into the folder",
        )
