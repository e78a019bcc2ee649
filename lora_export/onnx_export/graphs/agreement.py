"""How closely two exports of one model, in different precisions, agree on a few sentences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import InputError
from lora_export.graph_runs.feeds import built_in_rows, rows_of, token_feeds
from lora_export.graph_runs.runs import GraphRun
from lora_export.graph_runs.signature import Array


def agreements(
    reference: Path, others: Mapping[str, Path], tokenizer: Path, config: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """For the first output of each graph: top1_agreement and kl_mean (nats) of logits, cosine of any output.

    tokenizer: a folder. The entry is empty for graphs that do not read tokens.
    """
    longest = int(config.get("max_position_embeddings", 128))
    try:
        rows = built_in_rows(tokenizer, min(longest, 128))
        exact = _first_outputs(reference, rows)
        answers = {name: _first_outputs(graph, rows) for name, graph in others.items()}
    except (InputError, OSError, ValueError):  # no tokenizer, or inputs that do not follow from tokens
        return {name: {} for name in others}
    return {name: _agreement(exact, answer, config.get("vocab_size")) for name, answer in answers.items()}


def _agreement(exact: Array, answer: Array, vocabulary: Any) -> dict[str, float]:
    from scipy.special import log_softmax

    norms = np.linalg.norm(exact) * np.linalg.norm(answer)
    figures = {"cosine": float((exact * answer).sum() / np.maximum(norms, 1e-300))}
    if exact.shape[-1] == vocabulary:
        p, q = log_softmax(exact, -1), log_softmax(answer, -1)
        numbers = ~(np.isnan(p).any(-1) | np.isnan(q).any(-1))  # argmax would take NaN for the largest
        figures["top1_agreement"] = float(((p.argmax(-1) == q.argmax(-1)) & numbers).mean())
        figures["kl_mean"] = float((np.exp(p) * (p - q)).sum(-1).mean())
    return figures


def first_numbers(graph: Path, tokenizer: Path, text: str, count: int) -> list[float]:
    """The first numbers of a graph's first output for a text."""
    first = _first_outputs(graph, rows_of(tokenizer, [text], 512))
    return [float(x) for x in first.astype(np.float32).ravel()[:count]]


def _first_outputs(graph: Path, rows: Sequence[Sequence[int]]) -> Array:
    """The first output for each row of token ids, one row per position, in float64."""
    run = GraphRun(graph)
    name = next(iter(run.signature.outputs))
    outputs = [np.asarray(run.arrays(feed)[name], np.float64) for feed in token_feeds(run.signature, rows)]
    return np.concatenate([o.reshape(-1, o.shape[-1]) for o in outputs])
