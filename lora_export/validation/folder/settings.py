"""The settings that come with a merged folder against those that a merge writes: each key, each file.

A loader reads them all, so a merged folder with the right weights and another tokenizer, window or end of text is
another model.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_export.contracts import Check
from lora_export.errors import InputError
from lora_export.folder_files import VALUE_HEAD
from lora_export.storage.sealed import refuse_outward_link
from lora_export.validation.folder.companions import CONFIG, MOST, modules_of, settings_of
from lora_export.validation.folder.stored import listed

_DOCUMENTS = (".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
_DOCUMENT_NAMES = ("license", "licence", "notice", "readme", "use_policy", "acceptable_use", "copying")
# Files that a loader looks for, so that one too many is a setting, too.
_READ = (
    ".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt", ".py", ".bin", ".pt", ".pth", VALUE_HEAD,
    "/model.safetensors",
)  # fmt: skip
# Who wrote a file, and from where, steers nothing.
_NEUTRAL = frozenset({"transformers_version", "_name_or_path"})


def settings_check(expected: Path, merged: Path) -> Check:
    different = list(differences(expected, merged))
    note = "config.json, tokenizer, chat template, generation and processor settings are those of base and adapters"
    return Check("settings_differ", len(different), 0, not different, listed(different) or note)


def differences(expected: Path, merged: Path) -> Iterator[str]:
    """Each as "file: key: what it should be and what it is"."""
    wanted, actual = _settings(expected), _settings(merged)
    for name in sorted(wanted.keys() | actual.keys()):
        if name not in actual:
            yield f"{name}: missing"
        elif name in wanted:
            yield from _compared(name, wanted[name], actual[name])
        elif name.endswith(_READ):
            yield f"{name}: neither the base nor an adapter has this file"


def _settings(folder: Path) -> dict[str, Path]:
    """Relative name → file; of subfolders those that loaders look into."""
    files = [folder / CONFIG, *settings_of(folder)]
    files += [p for p in sorted(folder.iterdir()) if p.suffix in (".py", ".bin", ".pt", ".pth") and p.is_file()]
    # transformers would load the adapter
    files += [p for p in sorted(folder.glob("adapter_*.json")) if p.is_file()]
    templates = sorted(folder.glob("additional_chat_templates/*.jinja"))
    for path in (*templates, *modules_of(folder), folder / VALUE_HEAD):
        if path.is_file() and not path.parent.name.startswith("."):
            files.append(path)
    named = {p.relative_to(folder).as_posix(): p for p in files if not _is_document(p)}
    for path in named.values():
        refuse_outward_link(path)
    return named


def _is_document(path: Path) -> bool:
    return path.suffix.lower() in _DOCUMENTS or path.name.lower().startswith(_DOCUMENT_NAMES)


def _compared(name: str, wanted: Path, actual: Path) -> Iterator[str]:
    if _digest(wanted) == _digest(actual):
        return
    if not name.endswith(".json"):
        yield f"{name}: different contents"
        return
    before, after = _json(wanted), _json(actual)
    for key in sorted(before.keys() | after.keys()):
        if key not in _NEUTRAL and before.get(key, _ABSENT) != after.get(key, _ABSENT):
            yield f"{name}: {'.'.join((key, *_inside(before.get(key), after.get(key))))}: " + _both(
                before.get(key, _ABSENT), after.get(key, _ABSENT)
            )


class _Absent:
    def __repr__(self) -> str:
        return "none"


_ABSENT = _Absent()


def _inside(before: Any, after: Any) -> tuple[str, ...]:
    """The keys below that differ, where both sides are objects."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return ()
    keys = sorted(k for k in before.keys() | after.keys() if before.get(k, _ABSENT) != after.get(k, _ABSENT))
    return (", ".join(keys[:3]) + (", …" if len(keys) > 3 else ""),)


def _both(before: Any, after: Any) -> str:
    sides = [repr(x) for x in (before, after)]
    return f"should be {sides[0]}, is {sides[1]}" if sum(map(len, sides)) <= 80 else "different contents"


def _json(path: Path) -> dict[str, Any]:
    """torch_dtype is the older name of dtype. Loaders disagree about a key that appears twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a key appears twice")
        return made

    try:
        if path.stat().st_size > MOST:
            raise ValueError(f"more than {MOST} bytes")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the settings cannot be read: {error}", where=path, expected="a JSON file") from None
    if not isinstance(value, dict):
        return {"": value}
    if "torch_dtype" in value and "dtype" not in value:
        value["dtype"] = value.pop("torch_dtype")
    return value


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
