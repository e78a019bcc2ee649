"""The files that jobs are written in: TOML, CSV and JSONL as layers of settings, each with its place for people."""

import csv
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import InputError, JobsError, plain
from lora_export.storage.documents import parse_json, walk
from lora_export.storage.sealed import LARGEST, LARGEST_SETTINGS

MOST_ROWS = 1_000_000
LONGEST_LINE = 2**20  # characters of a row of CSV or JSONL
TABLES = (".csv", ".jsonl")  # files with a row an adapter
_SEVERAL = ";"  # between the values of one cell


@dataclass(frozen=True, slots=True)
class Place:
    """Where a setting stands. line: of the row, or of the header of a table, whose further lines are `lines`."""

    file: str
    what: str = ""
    line: int | None = None
    lines: Sequence[str] = ()

    def at(self, key: str) -> int:
        """The line of a key, as far as it can be told; 0 if it cannot."""
        if self.line is None or not key or not self.lines:
            return self.line or 0
        spelled = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]")
        for number, text in enumerate(self.lines[self.line :], self.line + 1):
            if spelled.match(text):
                return number
            if text.lstrip()[:1] == "[":
                break
        return self.line

    def words(self, key: str = "") -> str:
        """Such as "jobs.toml, line 12, [[adapter]] 3"."""
        line = self.at(key)
        return ", ".join([self.file, *([f"line {line}"] if line else []), *([self.what] if self.what else [])])


@dataclass(frozen=True, slots=True)
class Layer:
    """Settings that stand together. folder: what their paths are relative to."""

    values: Mapping[str, object]
    place: Place
    folder: Path


@dataclass(frozen=True)
class Fault:
    """What is wrong at one place. order: of the place in the file."""

    where: str
    found: str
    expected: str = ""
    next_step: str = ""
    order: tuple[str, int] = ("", 0)

    def words(self) -> str:
        more = f"; expected: {self.expected}" if self.expected else ""
        return plain(f"{self.where}: {self.found}{more}" + (f"; {self.next_step}" if self.next_step else ""))


class Faults:
    """What is wrong in a file, gathered: once, where many rows have it from one place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[tuple[str, str], Fault] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, place: Place, key: str, found: str, expected: str = "", next_step: str = "") -> None:
        where = place.words(key)
        fault = Fault(where, found, expected, next_step, (place.file, place.at(key)))
        self._found.setdefault((where, found), fault)

    def refuse(self) -> None:
        """InputError if there are any: of the only one, or all of them."""
        faults = sorted(self._found.values(), key=lambda f: f.order)
        if len(faults) == 1:
            one = faults[0]
            raise InputError(
                one.found, where=one.where, expected=one.expected or None, next_step=one.next_step or None
            )
        if faults:
            raise JobsError(self.path, [f.words() for f in faults])


def read_text(path: Path, limit: int) -> str:
    """A file of UTF-8, with or without a byte order mark. InputError for anything else."""
    if not path.is_file():
        raise InputError(
            "there is no such file" if not path.exists() else "this is not a file",
            where=path,
            expected="a jobs file: .toml, .csv or .jsonl",
        )
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise InputError(f"a jobs file of more than {limit // 2**20} MiB", where=path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {line} is not UTF-8", where=path, next_step="save it as UTF-8") from None


# --- TOML ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A TOML file. defaults: for all rows; bases: by name; rows, groups: each [[adapter]] and [[adapters]]."""

    defaults: Layer
    bases: Mapping[str, Layer]
    rows: tuple[Layer, ...]
    groups: tuple[Layer, ...]


def read_toml(path: Path, faults: Faults) -> Document:
    text = read_text(path, LARGEST_SETTINGS)
    try:
        document: dict[str, object] = tomllib.loads(text)
        for _ in walk(document, path):
            pass
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        found = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"this is not TOML: {found}", where=path, expected="key = value") from None
    lines = text.split("\n")
    headers = _headers(lines)
    top = Place(path.name, "", 0, lines)
    parts: dict[str, list[Layer]] = {}
    for kind in ("adapter", "adapters"):
        told = document.pop(kind, [])
        if isinstance(told, Mapping):
            faults.add(top, kind, f"[{kind}] is one table", f"[[{kind}]], which may be there many times")
            told = []
        if not isinstance(told, list):
            faults.add(top, kind, f"{kind} is not a table", f"[[{kind}]] and the keys of a row below it")
            told = []
        known = headers.get(f"[[{kind}]]", [])
        each = known if len(known) == len(told) else [None] * len(told)
        parts[kind] = [
            Layer(values, Place(path.name, f"[[{kind}]] {n}", line, lines if line else ()), path.parent)
            for n, (values, line) in enumerate(zip(told, each, strict=True), 1)
            if _is_table(values, top, kind, faults)
        ]
    bases = {}
    told = document.pop("base", {})
    if not isinstance(told, Mapping):
        faults.add(top, "base", f"base = {told!r}", "a table [base.NAME] with the model of each base")
        told = {}
    for name, values in told.items():
        if _is_table(values, top, f"base.{name}", faults):
            line = next(iter(headers.get(f"[base.{name}]", [])), None)
            place = Place(path.name, f"[base.{name}]", line, lines if line else ())
            bases[name] = Layer(values, place, path.parent)
    defaults = Layer(document, top, path.parent)
    return Document(defaults, bases, tuple(parts["adapter"]), tuple(parts["adapters"]))


def _is_table(values: object, place: Place, key: str, faults: Faults) -> bool:
    if not isinstance(values, Mapping):
        faults.add(place, key, f"{key} is {values!r}", "a table with keys and values")
        return False
    return True


def _headers(lines: Sequence[str]) -> dict[str, list[int]]:
    """Header → the lines that look like it. Only for messages: a text of many lines may look like one, too."""
    found: dict[str, list[int]] = {}
    header = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*(\]\]?)\s*(?:#.*)?")
    for number, line in enumerate(lines, 1):
        if match := header.fullmatch(line.rstrip("\r")):
            name = ".".join(part.strip().strip("\"'") for part in match[2].split("."))
            found.setdefault(f"{match[1]}{name}{match[3]}", []).append(number)
    return found


# --- a row an adapter ----------------------------------------------------------------------------------------


def read_rows(path: Path, faults: Faults) -> Iterator[Layer]:
    """The rows of a CSV or JSONL file; empty cells and nulls are not given. Faults of single rows are gathered."""
    text = read_text(path, LARGEST)
    reader = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    for number, layer in enumerate(reader(text, path, faults), 1):
        if number > MOST_ROWS:
            raise InputError(f"more than {MOST_ROWS:,} rows", where=path, next_step="several jobs files")
        yield layer


def _csv_rows(text: str, path: Path, faults: Faults) -> Iterator[Layer]:
    lines = csv.reader(text.splitlines(keepends=True), strict=True)
    columns: list[str] | None = None
    try:
        for row in lines:
            if columns is None:
                columns = _columns(row, path, faults) if any(row) else None
                continue
            if not any(cell.strip() for cell in row):
                continue
            place = Place(path.name, "", lines.line_num)
            if len(row) != len(columns):
                faults.add(place, "", f"{len(row)} cells", f"{len(columns)}, as many as the first line has columns")
                continue
            cells = {k: v.strip() for k, v in zip(columns, row, strict=True) if v.strip()}
            values = {k: v.split(_SEVERAL) if _SEVERAL in v else v for k, v in cells.items()}
            yield Layer({k: _stripped(v) for k, v in values.items()}, place, path.parent)
    except csv.Error as error:
        faults.add(Place(path.name, "", lines.line_num), "", f"this is not CSV: {error}")


def _stripped(value: str | list[str]) -> str | list[str]:
    return value if isinstance(value, str) else [v.strip() for v in value if v.strip()]


def _columns(row: Sequence[str], path: Path, faults: Faults) -> list[str]:
    columns, place = [name.strip() for name in row], Place(path.name, "", 1)
    if len(columns) == 1 and re.search(r"[;\t]", columns[0]):
        faults.add(place, "", f"the first line is {columns[0]!r}", "columns with commas between them")
        faults.refuse()
    for name in sorted({c for c in columns if columns.count(c) > 1}):
        faults.add(place, name, f"two columns are called {name}", "a column a key")
    if "" in columns:
        faults.add(place, "", f"column {columns.index('') + 1} has no name", "a key")
    return columns


def _json_rows(text: str, path: Path, faults: Faults) -> Iterator[Layer]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = Place(path.name, "", number)
        if len(line) > LONGEST_LINE:
            faults.add(place, "", f"a row of {len(line):,} characters")
            continue
        twice: list[str] = []

        def pairs(items: list[tuple[str, object]], twice: list[str] = twice) -> dict[str, object]:
            names = [name for name, _ in items]
            twice += sorted({n for n in names if names.count(n) > 1} if len(set(names)) < len(names) else ())
            return dict(items)

        try:
            value = parse_json(line.encode(), len(line), pairs)
            for _ in walk(value, path):
                pass
        except (ValueError, InputError) as error:
            told = error.found if isinstance(error, InputError) else _why(error)
            faults.add(place, "", f"this is not JSON: {told}", "an object a line")
            continue
        if not isinstance(value, dict):
            faults.add(place, "", f"the row is {value!r:.60}", "an object, {…}")
            continue
        for key in twice:
            faults.add(place, key, f"the key {key} stands twice", "once")
        yield Layer({k: v for k, v in value.items() if v is not None}, place, path.parent)


def _why(error: ValueError) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


__all__ = [
    "MOST_ROWS", "TABLES", "Document", "Faults", "Layer", "Place", "read_rows", "read_toml",
]  # fmt: skip
