"""Keys: what the object of a fleet's row, or all that adapters of one base share, is made of.

A key is the SHA-256 of the canonical JSON of its inputs: keys sorted, no spaces, UTF-8. It names contents, options
and versions; where they lie, who works on them, and on which machine, is not a part of it.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from lora_export.contracts import FleetRow, StoryOptions
from lora_export.contracts.option import Nested, Option
from lora_export.keys.hashes import Hashes
from lora_export.storage.sealed import sha256
from lora_export.version import LIBRARIES, __version__, installed

SCHEMA = 1  # of the inputs; another one makes every key another
_PLUGGED = (
    "lora_export.adapter_kinds", "lora_export.adapter_layouts", "lora_export.quantization_formats",
    "lora_export.export_engines", "lora_export.package_targets",
)  # fmt: skip
_WORDS = frozenset({"configured", "again", "stated"})  # what reports say, and fields that a run itself sets

Files = Mapping[str, str]  # name in its folder → SHA-256


class Spelled:
    """Options as inputs spell them. Rows that share an options object share its spelling, and its files are read
    once."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[object, dict[str, object]]] = {}
        self._texts: dict[int, tuple[object, str]] = {}

    def __call__(self, options: object) -> dict[str, object]:
        kept = self._made.get(id(options))
        if kept is None:
            kept = self._made[id(options)] = options, _options(options)
        return kept[1]

    def text(self, value: object) -> str:
        """The canonical JSON of a part of inputs."""
        if not isinstance(value, Mapping):
            return _canonical(value)
        kept = self._texts.get(id(value))
        if kept is None:
            kept = self._texts[id(value)] = value, _canonical(value)
        return kept[1]


def row_inputs(
    row: FleetRow, base: Files, adapters: Sequence[tuple[Files, float]], spelled: Spelled | None = None
) -> dict[str, object]:
    """What a row's object is made of. base, adapters: their files, with the weights; file options are read.

    InputError or OSError for a file option that cannot be read.
    """
    spelled = spelled or Spelled()
    inputs: dict[str, object] = {
        "schema": SCHEMA,
        "base": base,
        "adapters": [{"files": files, "weight": float(weight)} for files, weight in adapters],
        "options": spelled(row.options),
        "keep": row.keep,
        "versions": versions(),
    }
    if row.target is not None:
        inputs |= {"target": row.target, "package": _options(row.package)}
    return inputs


def base_inputs(options: StoryOptions, base: Files, spelled: Spelled | None = None) -> dict[str, object]:
    """What is made of a base for all of its adapters depends on this: its files, and how it is read and exported.

    Texts and sizes of the benchmark are not: what was computed for them is kept under them.
    """
    spelled = spelled or Spelled()
    return {
        "schema": SCHEMA,
        "base": base,
        "merge": spelled(options.merge),
        "export": spelled(options.export),
        "versions": versions(),
    }


def key_of(inputs: Mapping[str, object], spelled: Spelled | None = None) -> str:
    """64 hexadecimal digits. spelled: keeps the text of parts that many inputs share."""
    if spelled is None:
        return hashlib.sha256(_canonical(inputs).encode()).hexdigest()
    parts = (f"{_canonical(name)}:{spelled.text(inputs[name])}" for name in sorted(inputs))
    return hashlib.sha256(f"{{{','.join(parts)}}}".encode()).hexdigest()


def seed_of(key: str) -> int:
    """A seed for all validations of one base, which then look at the same inputs."""
    return int(key[:8], 16) % 2**31


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@functools.cache
def versions() -> Mapping[str, str]:
    """Of this tool, of the libraries that bytes depend on, and of packages that bring plug-ins."""
    from importlib.metadata import entry_points

    every = entry_points()
    plugged = {e.dist.name: e.dist.version for group in _PLUGGED for e in every.select(group=group) if e.dist}
    return {"lora-export": __version__} | installed(LIBRARIES) | dict(sorted(plugged.items()))


def _options(options: object) -> dict[str, object]:
    """The options that results depend on, by their fields' names; a file stands for its contents."""
    made: dict[str, object] = {}
    for each in fields(options):  # type: ignore[arg-type]
        how = each.metadata.get("option")
        if each.name in _WORDS or (isinstance(how, Option) and not how.changes_result):
            continue
        if isinstance(how, Nested) and how.json is None:  # the run sets it from the other options
            continue
        made[each.name] = _value(getattr(options, each.name), each.name)
    return made


def _value(value: Any, name: str) -> object:
    if is_dataclass(value):
        return _options(value)
    if isinstance(value, Path):
        return {"signer": _signer(value)} if name == "key" else _contents(value)
    if isinstance(value, (tuple, list)):
        return [_value(v, name) for v in value]
    return value


def _contents(path: Path) -> object:
    return Hashes().of(path) if path.is_dir() else sha256(path)


def _signer(path: Path) -> str:
    """A private key by a hash that is of no use for anything else: signatures differ, who signed must not."""
    return hashlib.sha256(b"lora-export signer" + path.read_bytes()).hexdigest()
