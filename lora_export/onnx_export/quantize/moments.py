"""Second moments of what the products of a graph multiply: H = Σ x xᵀ / tokens over calibration texts."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.contracts import Progress
from lora_export.errors import ExportError
from lora_export.graph_runs.feeds import Feed
from lora_export.onnx_export.graphs.matmuls import Product, candidates
from lora_export.onnx_export.quantize.segments import SEGMENT, run_in_parts
from lora_export.onnx_export.weights.dtypes import Array
from lora_export.onnx_export.weights.map import Weight

if TYPE_CHECKING:
    import onnx_ir as ir

FEWEST = 64  # rows of an expert's inputs, and an eighth of their width: below, its moments say little
_FP32 = 4  # bytes
_MATRIX = 2
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Inputs:
    """What some weights are multiplied with: values of a graph, each (…, size). A layer that runs several times has
    several."""

    values: tuple[str, ...]
    weights: tuple[Weight, ...]
    size: int


@dataclass(frozen=True)
class Moment:
    """matrix: (size, size) in fp32, the mean over `tokens` of x xᵀ; only its upper triangle is filled."""

    inputs: Inputs
    matrix: Array
    tokens: int


@dataclass
class _Sum:
    """matrix: in Fortran's order, its lower triangle filled; waiting: values that are not complete."""

    inputs: Inputs
    waiting: set[str]
    matrix: Any = None
    tokens: int = 0

    def add(self, rows: Array) -> None:
        from scipy.linalg.blas import ssyrk

        size = self.inputs.size
        if self.matrix is None:
            self.matrix = np.zeros((size, size), np.float32, order="F")
        if len(rows):
            self.matrix = ssyrk(1.0, rows.T, beta=1.0, c=self.matrix, lower=1, overwrite_c=1)
            self.tokens += len(rows)

    def moment(self) -> Moment:
        matrix = self.matrix.T
        matrix /= np.float32(max(1, self.tokens))
        return Moment(self.inputs, matrix, self.tokens)


def inputs_of(model: "ir.Model", weights: Sequence[Weight], skip: Collection[str] = ()) -> list[Inputs]:
    """What each product of the graph that could be quantized is multiplied with, in the order of the nodes; weights
    that share it together. skip: names of weights that are not wanted.

    Attention is one of them: a quantized export has its three projections as products of their own.
    """
    products = candidates(model, weights)
    known = {w.name: w for w in weights}
    read: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        name, size = _product(node, products, known)
        if not name or value is None or value.is_initializer() or name in skip:
            continue
        sizes[name] = size
        values = read.setdefault(name, [])
        if str(value.name) not in values:
            values.append(str(value.name))
    shared: dict[tuple[str, ...], list[Weight]] = {}
    for name, values in read.items():
        shared.setdefault(tuple(values), []).append(known[name])
    return [Inputs(values, tuple(own), sizes[own[0].name]) for values, own in shared.items()]


def _product(node: "ir.Node", products: Mapping[str, Product], known: Mapping[str, Weight]) -> tuple[str, int]:
    """The name of a node's weight, and the width of what it multiplies; no name for other nodes."""
    if (product := products.get(str(node.name))) is not None:
        return product.weight.name, product.rows
    if node.op_type == "Attention" and node.domain == _MICROSOFT and node.inputs[1] is not None:
        weight = known.get(str(node.inputs[1].name))
        if weight is not None and len(weight.shape) == _MATRIX:
            return weight.name, weight.shape[0]
    return "", 0


def moments(
    path: Path,
    feeds: Sequence[Feed],
    wanted: Sequence[Inputs],
    *,
    scratch: Path,
    longest: int,
    limit: int = SEGMENT,
    outputs: Mapping[str, Callable[[int, Array], None]] | None = None,
    progress: Progress,
) -> Iterator[Moment]:
    """The moment of each of `wanted` that saw a token, as soon as it is complete.

    path, feeds, scratch, limit: as in `run_in_parts`; longest: tokens of the longest feed; outputs: other values of
    the graph → what takes their arrays, with the number of the feed. ExportError for inputs that are not finite.
    """
    sums: dict[str, list[_Sum]] = {}
    for inputs in wanted:
        one = _Sum(inputs, set(inputs.values))
        for value in inputs.values:
            sums.setdefault(value, []).append(one)
    others = outputs or {}

    def take(number: int, name: str, array: Array) -> None:
        if name in others:
            others[name](number, array)
        for one in sums.get(name, ()):
            one.add(np.ascontiguousarray(array.reshape(-1, one.inputs.size), np.float32))

    costs = {name: _cost(own, longest) for name, own in sums.items()}
    parts = run_in_parts(
        path, feeds, {**dict.fromkeys(others, 0), **costs}, take, scratch=scratch, limit=limit, progress=progress
    )
    for names in parts:
        for name in names:
            for one in sums.pop(name, ()):
                one.waiting.discard(name)
                if not one.waiting and one.tokens:
                    yield _finite(one.moment(), path)
                    one.matrix = None


def _cost(sums: Sequence[_Sum], longest: int) -> int:
    """Bytes of the matrices of a value, and of the value itself."""
    return sum(_FP32 * one.inputs.size * (one.inputs.size + longest) for one in sums)


def _finite(moment: Moment, path: Path) -> Moment:
    if not np.isfinite(moment.matrix.diagonal()).all():
        raise ExportError(
            "the model computes numbers that are not finite on the calibration texts",
            where=path,
            tensor=moment.inputs.weights[0].name,
            expected="inputs of this product that are finite numbers",
            next_step="calibrate with another text, or --quantizer default",
        )
    return moment


def too_few(moment: Moment, tokens: int) -> bool:
    """Whether a product saw so few of all tokens (an expert's share) that its moments say little."""
    return moment.tokens < min(tokens, max(FEWEST, moment.inputs.size // 8))
