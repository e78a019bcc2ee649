"""The first module of PyTorch whose output a wrong graph does not compute, found without any names.

Every value inside the graph becomes an output. A module's output is found again if the graph has a value with the
same numbers, in any order of its axes, or as a part of a packed product.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lora_export.graph_runs.runs import GraphRun
from lora_export.validation.proof.trial import fitting

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, None)
_NAME = ".proof.onnx"


@dataclass(eq=False)
class Passed:
    """A module that ran. inputs, outputs: copies of its floating-point tensors."""

    path: str
    kind: str
    inputs: list[np.ndarray[Any, Any]]
    outputs: list[np.ndarray[Any, Any]]


@dataclass(eq=False)
class Recorder:
    """Modules in the order in which they finish."""

    passed: list[Passed] = field(default_factory=list)

    @contextlib.contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Inside, every module of `model` that runs is recorded, in place of what was recorded before."""
        self.passed.clear()
        with contextlib.ExitStack() as stack:
            for path, module in model.named_modules():
                stack.callback(module.register_forward_hook(self._hook(path), with_kwargs=True).remove)
            yield

    def _hook(self, path: str) -> Any:
        def note(module: Any, args: Any, kwargs: Any, result: Any) -> None:
            given = [*args, *kwargs.values()]
            made = result if isinstance(result, tuple | list) else [result]
            if isinstance(result, Mapping):
                made = list(result.values())
            self.passed.append(Passed(path, type(module).__name__, _arrays(given), _arrays(made)[:1]))

        return note


def _arrays(values: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    return [
        v.detach().float().cpu().numpy().copy()
        for v in values
        if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel()
    ]


def first_differing(passed: Sequence[Passed], values: Sequence[np.ndarray[Any, Any]], tolerance: float) -> str:
    """The innermost module whose inputs the graph has and whose output it has not, behind the last one that it has.

    A module that is fused away is passed over, because what comes behind it is found again.
    """
    known = _Known(values, tolerance)
    there = [not p.outputs or all(map(known.has, p.outputs)) for p in passed]
    last = max((i for i, found in enumerate(there) if found and passed[i].outputs), default=-1)
    behind = [p for p, found in list(zip(passed, there, strict=True))[last + 1 :] if not found]
    fed = [p for p in behind if all(map(known.has, p.inputs))]
    first = next(iter(fed or behind), None)
    if first is None:
        return ""
    parent = first.path.rpartition(".")[0]
    beside = [p for p in fed if p.path.rpartition(".")[0] == parent]
    if len(beside) > 1:  # layers with the same input are not all wrong: a fusion has swallowed them
        first = next((p for p in fed if p.path == parent), first)
    return f"{first.path or 'the whole model'} ({first.kind})"


class _Known:
    """The values of a graph, by how many numbers they have."""

    def __init__(self, values: Sequence[np.ndarray[Any, Any]], tolerance: float) -> None:
        self._tolerance = tolerance
        self._values = [v for v in values if np.isfinite(v).all()]
        self._sorted: dict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)
        for value in self._values:
            self._sorted[value.size].append(np.sort(value, axis=None))

    def has(self, wanted: np.ndarray[Any, Any]) -> bool:
        allowed = self._tolerance * max(float(np.abs(wanted).max()), 1e-30)
        own = np.sort(wanted, axis=None)
        for other in self._sorted.get(own.size, ()):
            ends = max(abs(own[0] - other[0]), abs(own[-1] - other[-1]))
            if ends <= allowed and float(np.abs(own - other).max()) <= allowed:
                return True
        return any(self._within(wanted, value, allowed) for value in self._values)

    @staticmethod
    def _within(wanted: np.ndarray[Any, Any], value: np.ndarray[Any, Any], allowed: float) -> bool:
        """Whether `wanted` is a range of the last axis of a wider value."""
        if wanted.ndim < 2 or value.ndim < 2 or value.shape[-1] <= wanted.shape[-1]:
            return False
        rows, wide = wanted.reshape(-1, wanted.shape[-1]), value.reshape(-1, value.shape[-1])
        if len(rows) != len(wide):
            return False
        starts = np.flatnonzero(np.abs(wide[0, : wide.shape[1] - rows.shape[1] + 1] - rows[0, 0]) <= allowed)
        return any(
            float(np.abs(wide[:, s : s + rows.shape[1]] - rows).max()) <= allowed for s in starts.tolist()[:64]
        )


def inner_values(graph: Path, feed: Mapping[str, Any], provider: str) -> list[np.ndarray[Any, Any]]:
    """Every floating-point value that the graph computes for a feed, constants and inputs among them."""
    model = ir.load(graph)
    outputs = {v.name for v in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.name not in outputs and value.dtype in _FLOATS:
                model.graph.outputs.append(value)
                outputs.add(value.name)
    path = graph.with_name(_NAME)
    try:
        ir.save(model, path)
        run = GraphRun(path, provider)
        given = {n: fitting(feed[n], v.dtype) for n, v in run.signature.inputs.items() if n in feed}
        found = [*run.arrays(given).values(), *given.values()]
    finally:
        path.unlink(missing_ok=True)
    return [v.astype(np.float32) for v in found if isinstance(v, np.ndarray) and v.dtype.kind == "f" and v.size]
