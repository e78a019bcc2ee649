"""JSON from untrusted files, decoded into typed documents once, where it comes in; and typed documents as JSON."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_export.contracts.figures import NONFINITE, NOT_IN_JSON, Figure
from lora_export.errors import InputError

T = TypeVar("T")

DEEPEST = 64  # levels, so that recursive walks of a document end
MOST_DIMENSIONS = 64  # of a tensor; NumPy's limit
LARGEST = 2**63 - 1  # of a size, an offset, and the number of elements of a tensor
# Bytes of memory that parsed JSON takes for each of these characters of the text: an object with a field or two, a
# list with an element or two, a field, an element, and half a string.
_COSTS = {b"{": 184, b"[": 88, b":": 100, b",": 40, b'"': 28}
_EXPANSION, _ALLOWANCE = 6, 32 * 2**20  # bytes that it may take per byte of the file, and in addition


def decode(value: Any, type_: type[T], what: str, where: str | Path) -> T:
    """A parsed JSON document as a frozen dataclass (or any other type that msgspec knows).

    what: the document's name for people. InputError, with the place in the document, for a value of another type, a
    missing field, an integer of more than 64 bits, NaN or infinity where no `Figure` stands, text that is not
    Unicode, and a document that is nested too deeply. Fields that the type does not have are ignored.
    """
    import msgspec

    for part in walk(value, where):
        if isinstance(part, float) and not math.isfinite(part):
            raise _damaged(what, "", f"holds {part}", "finite numbers", where)
        if isinstance(part, int) and not -(2**63) <= part < 2**63:
            raise _damaged(what, "", "holds an integer that is too large", "integers of 64 bits", where)
    try:
        return msgspec.convert(value, type_, dec_hook=_decoded)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        raise _damaged(what, place.rstrip("`").lstrip("."), *_found_and_expected(text), where) from None


def as_json(value: object) -> Any:
    """The JSON value of a dataclass, or of anything made of dataclasses: what `decode` reads again.

    Fields that are declared with `metadata=NOT_IN_JSON` are left out.
    """
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, float):  # or a subclass: a Figure, a number of NumPy
        return finite(float(value))
    if (names := _kept_fields(type(value))) is not None:  # type: ignore[arg-type]  # a class is hashable
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


@functools.cache
def _kept_fields(of: type) -> tuple[str, ...] | None:
    """None for what is no dataclass."""
    return tuple(f.name for f in fields(of) if f.metadata != NOT_IN_JSON) if is_dataclass(of) else None


def json_schema(type_: type) -> dict[str, Any]:
    """The JSON Schema (2020-12) of documents of this type."""
    import msgspec

    figure: Any = {"anyOf": [{"type": "number"}, {"enum": list(NONFINITE)}]}
    hooks: dict[Any, dict[str, Any]] = {Figure: figure, object: {"description": "any JSON value"}}
    schema = msgspec.json.schema(type_, schema_hook=lambda t: hooks.get(t, {"type": "string"}))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _decoded(type_: type, value: Any) -> Any:
    if type_ is object:  # any JSON value
        return value
    if type_ is Path and isinstance(value, str):
        return Path(value)
    if type_ is Figure and _is_figure(value):
        return Figure(value)
    raise ValueError(f"Expected `{type_.__name__}`, got `{_JSON_TYPES.get(type(value), type(value).__name__)}`")


def _is_figure(value: Any) -> bool:
    return value in NONFINITE if isinstance(value, str) else type(value) in (int, float)


_JSON_TYPES = {
    str: "str", int: "int", float: "float", bool: "bool", dict: "object", list: "array", type(None): "null",
}  # fmt: skip
_PLAIN_ENGLISH = {
    "str": "a string", "int": "an integer", "float": "a number", "bool": "a boolean", "object": "an object",
    "array": "an array", "null": "null", "Path": "a string", "Figure": f"a number, or {' or '.join(NONFINITE)}",
}  # fmt: skip


def _found_and_expected(message: str) -> tuple[str, str]:
    """What the value is and what was expected, in our words, from a message of msgspec."""
    if missing := re.fullmatch(r"Object missing required field `(.*)`", message):
        return f"has no field {missing[1]!r}", "all fields of the document"
    wrong = re.fullmatch(r"Expected `(.*)`, got `(.*)`", message)
    if not wrong:
        return f"is wrong: {message[:1].lower()}{message[1:]}", "a value that this field can have"
    expected = " or ".join(_PLAIN_ENGLISH.get(one, one) for one in wrong[1].split(" | "))
    return f"is {_PLAIN_ENGLISH.get(wrong[2], wrong[2])}", expected


def _damaged(what: str, place: str, found: str, expected: str, where: str | Path) -> InputError:
    return InputError(f"{what} is damaged: {place or 'it'} {found}", where=where, expected=expected)


def parse_json(raw: bytes, size: int, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The JSON value in UTF-8 bytes of a file of `size` bytes; pairs: object_pairs_hook of `json`.

    ValueError, before anything is parsed, for text such as [[],[],… that would take many times its size in memory,
    and for invalid JSON. Python itself refuses integers of more than 4,300 digits.
    """
    if sum(raw.count(character) * cost for character, cost in _COSTS.items()) > _EXPANSION * size + _ALLOWANCE:
        raise ValueError("it has far more brackets and commas than a file of its size has use for")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def elements(shape: Sequence[int]) -> int | None:
    """Number of elements of a tensor of this shape; None if no tensor can have so many elements or dimensions.

    A size of 0 does not make the others harmless: the strides of such a tensor are products of them, too.
    """
    if len(shape) > MOST_DIMENSIONS:
        return None
    strides = 1
    for size in shape:
        if not 0 <= size <= LARGEST:
            return None
        strides *= max(size, 1)
        if strides > LARGEST:
            return None
    return 0 if 0 in shape else strides


def walk(document: Any, where: str | Path) -> Iterator[Any]:
    """Every value of a document, itself first. InputError if it is too deep, or if a string is not Unicode."""
    level, depth = [document], 0
    while level:
        if depth > DEEPEST:
            raise InputError(f"the JSON is nested in more than {DEEPEST} levels", where=where)
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if not value.isascii() and not is_text(value):
                    raise InputError(
                        f"{value!r} is not a Unicode string", where=where, expected="no lone surrogates"
                    )
            elif isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        yield from level
        level, depth = inner, depth + 1


def is_text(value: str) -> bool:
    r"""Whether it can be written as UTF-8: JSON can spell half a character ("\ud800"), which no file can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def finite(value: Any) -> Any:
    """The same JSON value with "nan", "inf" and "-inf" for what JSON has no number for."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    return value
