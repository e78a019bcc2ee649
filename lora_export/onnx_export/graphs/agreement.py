"""How nearly two exports of one model, of different precisions, say the same on a few sentences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.inputs import Feed, built_in_rows, rows_of, token_feeds
from lora_export.onnx_export.weights.dtypes import Array


def agreements(
    reference: Path, others: Mapping[str, Path], tokenizer: Path, config: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """By the first output of each graph: top1_agreement and kl_mean (nats) of logits, cosine of any.

    tokenizer: a folder. An empty entry for graphs that do not read tokens.
    """
    longest = int(config.get("max_position_embeddings", 128))
    try:
        rows = built_in_rows(tokenizer, min(longest, 128))
        want = _first_outputs(reference, token_feeds(reference, rows))
        found = {n: _first_outputs(g, token_feeds(g, rows)) for n, g in others.items()}
    except (ExportError, OSError, ValueError):  # no tokenizer, or inputs that tokens do not give
        return {name: {} for name in others}
    return {n: _agreement(want, have, config.get("vocab_size")) for n, have in found.items()}


def _agreement(want: Array, have: Array, vocabulary: Any) -> dict[str, float]:
    found = {"cosine": float((want * have).sum() / np.maximum(np.linalg.norm(want) * np.linalg.norm(have), 1e-300))}
    if want.shape[-1] == vocabulary:
        p, q = _log_softmax(want), _log_softmax(have)
        numbers = ~(np.isnan(p).any(-1) | np.isnan(q).any(-1))  # argmax would take NaN for the largest
        found["top1_agreement"] = float(((p.argmax(-1) == q.argmax(-1)) & numbers).mean())
        found["kl_mean"] = float((np.exp(p) * (p - q)).sum(-1).mean())
    return found


def first_numbers(graph: Path, tokenizer: Path, text: str, count: int) -> list[float]:
    """The first numbers of a graph's first output for a text."""
    found = _first_outputs(graph, token_feeds(graph, rows_of(tokenizer, [text], 512)))
    return [float(x) for x in found.astype(np.float32).ravel()[:count]]


def _first_outputs(graph: Path, feeds: Sequence[Feed]) -> Array:
    """The first output for each feed, a row a position, in float64."""
    from lora_export.runtime import open_session

    session = open_session(graph, "cpu")
    name = session.get_outputs()[0].name
    rows = [np.asarray(session.run([name], dict(feed))[0], np.float64) for feed in feeds]
    return np.concatenate([r.reshape(-1, r.shape[-1]) for r in rows])


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
