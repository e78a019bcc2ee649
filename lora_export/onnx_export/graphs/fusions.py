"""Compares the fused graphs of an export with graphs without optimizations, on made-up inputs.

Fusions match patterns, and a pattern that almost fits computes something else. Validating a merge compares outputs
with PyTorch; an export by itself has only this check.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import ExportError
from lora_export.graph_runs.feeds import SMALLEST_VOCABULARY, Sizes, made_up
from lora_export.graph_runs.runs import GraphRun
from lora_export.graph_runs.signature import Array
from lora_export.onnx_export.graphs.checks import load_graph

RELATIVE = 1e-4  # share of an output's largest value in fp32: additions in another order


def compare(fused: Path, plain: Path, config: Mapping[str, Any], limit: float = RELATIVE) -> float:
    """The largest difference of any output, relative to its largest value. ExportError beyond `limit`."""
    run = GraphRun(plain)
    feed = _feed(run, plain, config)
    expected, actual = run.arrays(feed), GraphRun(fused).arrays(feed)
    if expected.keys() != actual.keys():
        odd = sorted(expected.keys() ^ actual.keys())[0]
        raise _refusal(fused, f"only one of the graphs has the output {odd}")
    worst = 0.0
    for name, value in expected.items():
        if value.shape != actual[name].shape:
            raise _refusal(fused, f"{name} has shape {list(actual[name].shape)} instead of {list(value.shape)}")
        error = difference(value, actual[name])
        if not error <= limit:
            raise _refusal(fused, f"{name} differs by {error:.2g} of its largest value")
        worst = max(worst, error)
    return worst


def difference(expected: Array, actual: Array) -> float:
    """The largest difference, relative to the largest value expected; NaN if either has one."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(expected - actual).max(initial=0) / np.maximum(np.abs(expected).max(initial=0), 1e-30))


def _feed(run: GraphRun, path: Path, config: Mapping[str, Any]) -> dict[str, Array]:
    vision = config.get("vision_config") or config
    named = {
        "height|width": int(vision.get("image_size", 32)),
        "channels": int(vision.get("num_channels", 3)),
    }
    inputs = run.signature.inputs.values()
    # with a cache, GroupQueryAttention takes several tokens in a single row only
    batch = 1 if any(n.op_type == "GroupQueryAttention" for n in load_graph(path).graph.node) else 2
    past = 3 if any(value.is_cache for value in inputs) else 0
    vocabulary = min(int(config.get("vocab_size", SMALLEST_VOCABULARY)), SMALLEST_VOCABULARY)
    return made_up(inputs, Sizes(batch, 7, past, 9, 16_000, named, vocabulary))


def _refusal(path: Path, what: str) -> ExportError:
    return ExportError(
        f"the fused graph does not compute what the plain one does: {what}",
        where=path,
        expected=f"a difference of at most {RELATIVE:.0e}",
        next_step="--optimize basic, or none; please report the architecture",
    )
