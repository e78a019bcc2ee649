"""What all kinds of models have in common, and the rows of a request."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from .graphs import Graph


class Refused(ValueError):
    """An input that the model cannot take, in words for whoever sent it."""


class Model:
    """columns: of a request, the one of plain texts first; longest: tokens that the model takes."""

    columns: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.longest = folder, int(config["longest"])
        self.providers = list(config["providers"])
        self.settings = self.document("config.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def answers(self, data: Any, params: Mapping[str, Any]) -> list[Any]:
        """An answer for each row. Refused for a row or a parameter that does not fit."""
        raise NotImplementedError

    def document(self, name: str) -> dict[str, Any]:
        """A JSON document beside the graphs; empty if there is none."""
        path = self.folder / name
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def graph(self, name: str) -> Graph:
        return Graph(self.folder / name, self.providers)


def rows_of(data: Any, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a request: column → value, without what is missing.

    data: a table of pandas, one row, texts of the first column, or one such text. A list in the place of a text is
    a row for each: that is what MLflow makes of {"inputs": {column: [text, …]}}.
    """
    if hasattr(data, "to_dict"):
        if not any(column in data for column in columns):  # MLflow drops others, and all rows with the last of them
            raise Refused(f"the table has no column {' or '.join(map(repr, columns))}")
        given = data.to_dict("records")
    elif isinstance(data, Mapping | str):
        given = [data]
    else:
        given = list(data)
    records = [dict(row) if isinstance(row, Mapping) else {columns[0]: row} for row in given]
    rows = [row for record in records for row in _spread(record, columns[0])]
    return [{c: row[c] for c in columns if not _is_missing(row.get(c))} for row in rows]


def _spread(record: dict[str, Any], column: str) -> Iterator[dict[str, Any]]:
    value = record.get(column)
    texts = value.tolist() if isinstance(value, np.ndarray) else value
    for text in texts if isinstance(texts, list | tuple) else [texts]:
        yield record | {column: text}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: Mapping[str, Any], column: str, number: int) -> str:
    """Refused if there is none."""
    value = row.get(column)
    if not isinstance(value, str):
        found = "nothing" if value is None else f"a value of type {type(value).__name__}"
        raise Refused(f"row {number} has {found} in the column {column!r}, where a text is expected")
    return value
