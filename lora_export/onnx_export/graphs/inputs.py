"""Inputs for a graph that reads tokens, for runs that measure or calibrate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import load_graph
from lora_export.onnx_export.weights.dtypes import Array

if TYPE_CHECKING:
    import onnx

Feed = Mapping[str, Array]
_TEXTS = (
    "The ship left the harbour before dawn, and by noon the coast was a grey line behind it.",
    "Water boils at a lower temperature on a mountain, because the air above it weighs less.",
    "To add two fractions, bring them to a common denominator first; then add what stands above.",
    "She asked him whether the letter had come. He shook his head and went on sweeping the yard.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: Which river runs through Vienna?\nAnswer: The Danube, which comes from the Black Forest.",
)


def token_feeds(model: Path, rows: Sequence[Sequence[int]]) -> list[Feed]:
    """One feed a row of token ids: batch 1, nothing masked, positions from 0, empty caches.

    ExportError for a graph that reads anything else.
    """
    graph = load_graph(model).graph
    weights = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in weights]
    return [{i.name: _value(i, np.asarray(row, np.int64)) for i in inputs} for row in rows]


def built_in_rows(folder: Path, longest: int) -> list[list[int]]:
    """Token ids of a few sentences, by the tokenizer of a model's folder; longest: how many positions there are."""
    return rows_of(folder, _TEXTS, longest)


def rows_of(folder: Path, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Token ids of texts, cut to `longest`."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [ids[:longest] for ids in (tokenizer(text)["input_ids"] for text in texts) if ids]


def _value(given: "onnx.ValueInfoProto", row: Array) -> Array:
    import onnx

    kind = given.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if given.name.startswith("past"):
        sizes = [d.dim_value or 0 for d in kind.shape.dim]
        return np.zeros([1, *sizes[1:]], dtype)
    values = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(len(row)),
        "token_type_ids": np.zeros_like(row),
    }
    if given.name not in values:
        raise ExportError(
            f"the graph reads {given.name!r}, which tokens alone do not give",
            expected=", ".join(values),
        )
    return values[given.name][None].astype(dtype)
