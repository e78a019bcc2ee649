"""A root of a fleet, checked again: every object, prepared base and verdict against its record."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lora_export.contracts import Findings, Progress, StoredFile, Verification
from lora_export.errors import InputError
from lora_export.fleet.stores import Store, opened
from lora_export.fleet.stores.attempts import is_attempt
from lora_export.fleet.stores.files import differences
from lora_export.fleet.stores.writing import FOLDER
from lora_export.records import NAME, decoded
from lora_export.storage.documents import decode, parse_json

PLACES = {"objects": "objects", "bases": "prepared bases", "failed": "verdicts"}
READERS = 8  # files that are read at once
_BY_ITSELF = (
    "what the objects compute: `lora-export verify ROOT/objects/KEY` with the base and the adapters checks that of "
    "one, which has to lie in a folder"
)
_NAMED = 3  # examples in a message


@dataclass(frozen=True)
class _Name:
    key: str
    place: str


@dataclass(frozen=True)
class _Checked:
    """Of an object: what is wrong, uploads without a record, and what was read."""

    wrong: list[str]
    unfinished: set[str] = field(default_factory=set)
    files: int = 0
    nbytes: int = 0


@dataclass
class _Unfinished:
    """Uploads that have no record, of writers that were killed or are at work."""

    names: set[str]

    def told(self) -> Iterator[str]:
        if self.names:
            some = ", ".join(sorted(self.names)[:_NAMED]) + ", …" * (len(self.names) > _NAMED)
            yield (
                f"{len(self.names)} unfinished uploads ({some}): their writers are at work, or were killed; "
                "a later writer of the same object removes them"
            )


def is_root(path: str) -> bool:
    """Whether something is the root of a fleet, or can be nothing else that is checked (a URL)."""
    if "://" in path:
        return True
    return any(Path(path, name).exists() for name in ("fleet.json", "shards", *PLACES))


def verify_root(root: str, progress: Progress) -> Verification:
    """Compare every file below objects/, bases/ and failed/ with the record of its object, by name, size and
    SHA-256, and names/ with the objects. Every byte is read. OutputError if the store cannot be read."""
    store = opened(root)
    findings = Findings()
    unfinished = _Unfinished({n.split("/")[1].removesuffix(".lock") for n in store.names(FOLDER)})
    keys = {}
    for place, words in PLACES.items():
        progress.stage(f"verify: {words} of the fleet")
        keys[place] = _check_place(store, place, words, findings, unfinished, progress)
    names = sorted(store.names("names"))
    if names:
        findings.judge("names", f"{len(names):,} names lead to objects", _odd_names(store, names, keys["objects"]))
    if not findings.done:
        raise InputError("no object of a fleet was found", where=store.where, expected="the root of a fleet")
    findings.not_checked += [*unfinished.told(), _BY_ITSELF]
    return findings.result()


def _check_place(
    store: Store, place: str, words: str, findings: Findings, unfinished: _Unfinished, progress: Progress
) -> set[str]:
    """Check all objects of a place; the keys of those that have a record."""
    names = _by_key(store.names(place))
    raws = store.records(place)
    keys = sorted(names.keys() | raws.keys())
    failures: list[str] = []
    count = size = 0
    with ThreadPoolExecutor(READERS, "verify") as pool:
        for done, key in enumerate(keys):
            progress.advance(done, len(keys))
            where = f"{place}/{key}"
            checked = _check(store, pool, where, raws.get(key), names.get(key, set()))
            if checked.wrong:  # perhaps a writer was at work meanwhile
                raw, files = store.read(f"{where}/{NAME}"), _by_key(store.names(where)).get(key, set())
                checked = _check(store, pool, where, raw, files)
            count, size = count + checked.files, size + checked.nbytes
            failures += checked.wrong
            unfinished.names |= checked.unfinished
    if keys:
        passed = f"{len(raws):,} {words} with {count:,} files ({size / 1e6:,.1f} MB) are as their records say"
        findings.judge(place, passed, failures)
    return set(raws)


def _by_key(names: Iterable[str]) -> dict[str, set[str]]:
    """Files of PLACE/KEY/ by KEY, below it."""
    keys: dict[str, set[str]] = {}
    for name in names:
        _, key, *below = name.split("/")
        keys.setdefault(key, set()).add("/".join(below))
    return keys


def _check(store: Store, pool: ThreadPoolExecutor, where: str, raw: bytes | None, files: set[str]) -> _Checked:
    """An object by its record, None if it has none, and the files that lie there."""
    try:
        record = decoded(raw, f"{where}/{NAME}") if raw is not None else None
    except InputError as error:
        return _Checked([f"{where}/{NAME}: {error.found}"])
    at = record.at if record is not None else ""
    attempts = {first for f in files if is_attempt(first := f.partition("/")[0]) and first != at}
    unfinished = {f"{where}/{attempt}" for attempt in attempts}
    files = {f for f in files if f.partition("/")[0] not in attempts and f != NAME}
    if record is None:
        return _Checked([f"{where} has {len(files)} files and no record"] * bool(files), unfinished)
    if where.rpartition("/")[2] != record.key:
        return _Checked([f"{where} has the record of the key {record.key}"], unfinished)
    below = f"{at}/" if at else ""
    own = {f"{below}{name}": name for name in record.files}
    wrong = [f"{where}/{f} is not in the record" for f in sorted(files - own.keys())]
    readable = [f for f in own if f in files]
    there: dict[str, StoredFile] = {}
    for f, measured in zip(readable, pool.map(partial(_measured, store, where), readable), strict=True):
        if isinstance(measured, StoredFile):
            there[own[f]] = measured
        else:
            wrong.append(measured)
    wrong += [f"{where}/{below}{problem}" for problem in differences(record.files, there)]
    return _Checked(wrong, unfinished, len(there), sum(m.bytes for m in there.values()))


def _measured(store: Store, where: str, name: str) -> StoredFile | str:
    """A file, or what is wrong with it."""
    try:
        return store.measure(f"{where}/{name}") or f"{where}/{name} is gone"
    except InputError as error:
        return f"{where}/{name}: {error.found}"


def _odd_names(store: Store, names: Iterable[str], keys: set[str]) -> Iterator[str]:
    for name in names:
        raw = store.read(name)
        if raw is None:
            continue
        try:
            told = decode(parse_json(raw, len(raw)), _Name, "the name", f"{store.where}/{name}")
        except (ValueError, InputError) as error:
            yield f"{name}: {error.found if isinstance(error, InputError) else error}"
            continue
        if told.place != f"objects/{told.key}":
            yield f"{name} names the place {told.place}, which is not that of its key"
        elif told.key not in keys:
            yield f"{name} names {told.place}, which has no object"
