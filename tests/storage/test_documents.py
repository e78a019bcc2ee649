"""Typed documents: JSON decoded as frozen dataclasses, with the place and the type in every refusal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lora_export.contracts.figures import Figure
from lora_export.errors import InputError
from lora_export.storage.documents import as_json, decode, json_schema


@dataclass(frozen=True)
class Inner:
    count: int


@dataclass(frozen=True)
class Outer:
    figure: Figure | None
    numbers: tuple[int, ...] = ()
    word: Literal["a", "b"] = "a"
    path: Path | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    share: float = 1.0
    inner: tuple[Inner, ...] = ()


def test_as_json_of_defaults_round_trips() -> None:
    document = decode({"figure": 2, "inner": [{"count": 1}], "unknown": 0}, Outer, "the file", "f.json")
    assert document == Outer(2.0, inner=(Inner(1),))
    json = as_json(document)
    assert list(json) == ["figure", "numbers", "word", "path", "counts", "share", "inner"]
    assert decode(json, Outer, "the file", "f.json") == document


def test_as_json_of_nonfinite_figure_round_trips() -> None:
    json = as_json(Outer(float("-inf"), path=Path("a/b"), counts={"x": 1}))
    assert (json["figure"], json["path"], json["counts"]) == ("-inf", "a/b", {"x": 1})
    assert decode(json, Outer, "the file", "f.json").figure == float("-inf")


@pytest.mark.parametrize(
    ("document", "found", "expected"),
    [
        ([], "it is an array", "an object"),
        ({}, "it has no field 'figure'", "all fields"),
        ({"figure": "high"}, "figure is a string", "a number, or nan or inf or -inf"),
        ({"figure": True}, "figure is a boolean", "a number"),
        ({"figure": 1, "numbers": [1, "2"]}, r"numbers\[1\] is a string", "an integer"),
        ({"figure": 1, "inner": [{"count": None}]}, r"inner\[0\].count is null", "an integer"),
        ({"figure": 1, "share": float("nan")}, "it holds nan", "finite numbers"),
        ({"figure": 1, "numbers": [2**63]}, "it holds an integer that is too large", "64 bits"),
        ({"figure": 1, "word": "c"}, "word is wrong", "a value that this field can have"),
    ],
)
def test_decode_damaged_document_names_place_and_type(document: Any, found: str, expected: str) -> None:
    with pytest.raises(InputError, match=f"the file is damaged: {found}") as error:
        decode(document, Outer, "the file", "f.json")
    assert expected in str(error.value) and "f.json" in str(error.value)


def test_json_schema_accepts_what_decode_accepts() -> None:
    import jsonschema

    schema = json_schema(Outer)
    cases = (({"figure": "nan"}, True), ({"figure": "x"}, False), ({"figure": 1, "inner": [{}]}, False))
    for document, sound in cases:
        assert jsonschema.Draft202012Validator(schema).is_valid(document) is sound
