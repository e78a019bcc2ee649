"""Documents that another program will read: a key or a value that is not on a list refuses the document.

A rule says what a value may be. A `Value`: what its test holds for. {"a": rule}: an object with these keys alone,
none of which is required. {str: rule}: an object with any keys. [rule]: a list. (a, b): one of these.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import InputError
from lora_export.storage import sealed

LIMIT = 2**20  # bytes; the largest configuration that a runtime is given has a few thousand
Rule = Any


@dataclass(frozen=True)
class Value:
    """A plain value. expected: in words."""

    expected: str
    holds: Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**31


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200 and all(c.isalnum() or c in "._-%/ :" for c in value)


WHOLE = Value("an integer of 32 bits", _whole)
NUMBER = Value("a finite number", _number)
FLAG = Value("true or false", lambda v: isinstance(v, bool))
WORD = Value("a name of letters, digits and ._-%/:", _word)
DIGITS = Value("a string of digits", lambda v: isinstance(v, str) and v.isascii() and v.isdigit() and len(v) < 20)
FILE = Value("the plain name of a file in the same folder", lambda v: isinstance(v, str) and sealed.plain_name(v))
GRAPH = Value(
    "the plain name of an .onnx file in the same folder",
    lambda v: isinstance(v, str) and sealed.plain_name(v) and v.endswith(".onnx"),
)


def one_of(*words: Any) -> Value:
    return Value(
        " or ".join(map(str, words)), lambda v: any(v is w or (v == w and type(v) is type(w)) for w in words)
    )


def read(path: Path) -> Any:
    """The JSON document in a file. InputError if it is too large, or if an object in it has a key twice.

    Of two values under one key, Python takes the second and another reader may take the first, or both.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise InputError(
                    f"the key {name!r} occurs twice in one object",
                    where=path,
                    expected="each key once: readers differ in which value they use",
                )
            fields[name] = value
        return fields

    try:
        sealed.refuse_outward_link(path)
        if path.stat().st_size > LIMIT:
            raise InputError(f"a configuration of more than {LIMIT} bytes", where=path)
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"the file is not valid JSON: {error}", where=path) from None


def check(document: Any, rule: Rule, what: str, where: Path) -> None:
    """InputError, with the place in the document, for the first key or value that is not on the list."""
    for place, value, expected in _misfits(document, rule, ""):
        if value is _UNKNOWN:
            raise InputError(
                f"{what} has the key {place!r}, which is not on the list of what a runtime may read",
                where=where,
                expected=expected,
                next_step="remove the key, or create the folder again with lora-export",
            )
        raise InputError(f"{what} sets {place} to {value!r}", where=where, expected=expected)


_UNKNOWN = object()
Misfit = tuple[str, Any, str]


def _misfits(value: Any, rule: Rule, place: str) -> Iterator[Misfit]:
    if isinstance(rule, tuple):
        rule = _alternative(value, rule)
    if isinstance(rule, Value):
        if not rule.holds(value):
            yield place, value, rule.expected
    elif not isinstance(value, type(rule)):
        yield place, value, "an object" if isinstance(rule, dict) else "a list"
    elif isinstance(rule, list):
        for i, item in enumerate(value):
            if not (isinstance(rule[0], Value) and rule[0].holds(item)):  # the usual case, and a fast one
                yield from _misfits(item, rule[0], f"{place}[{i}]")
    else:
        for key, item in value.items():
            inner = f"{place}.{key}" if place else key
            if str in rule or key in rule:
                yield from _misfits(item, rule.get(key, rule.get(str)), inner)
            else:
                yield inner, _UNKNOWN, f"one of {_listed(rule)}"


def _alternative(value: Any, rules: Iterable[Rule]) -> Rule:
    """The rule of the same shape, or all those of plain values together."""
    plain = [r for r in rules if isinstance(r, Value)]
    shaped = [r for r in rules if not isinstance(r, Value) and isinstance(value, type(r))]
    either = Value(" or ".join(r.expected for r in plain), lambda v: any(r.holds(v) for r in plain))
    return shaped[0] if shaped else either


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, keys)))
