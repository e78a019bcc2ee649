"""What `inspect` found, for people: a table of facts, and of a pipeline a row for each of its models."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.commands.talk import megabytes, table
from lora_export.escape import shown

_MODELS = ("Model", "Class", "Parameters", "Types", "Size", "Variants", "Note")


def found_words(document: Mapping[str, Any]) -> str:
    """The document in words."""
    models = document.get("components") if document.get("kind") == "pipeline" else None
    facts = {k: v for k, v in document.items() if models is None or k != "components"}
    text = table([(k.replace("_", " "), in_words(v)) for k, v in facts.items()])
    return f"{text}\n\n{columns([_MODELS, *_rows(models)])}" if models else text


def _rows(models: Mapping[str, Mapping[str, Any]]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for name, model in models.items():
        readable = model["problem"] is None
        notes = [model["problem"], model.get("quantization"), "merged" if model["merged_by_lora_export"] else None]
        rows.append(
            (
                name,
                model["class"],
                f"{model['parameters']:,}" if readable else "–",
                in_words(model["dtypes"]) if readable else "–",
                megabytes(model["bytes"]) if readable else "–",
                in_words(model["variants"]),
                "; ".join(n for n in notes if n) or "–",
            )
        )
    return rows


def in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {in_words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows under each other, the first column to the left and all others to the right."""
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )
