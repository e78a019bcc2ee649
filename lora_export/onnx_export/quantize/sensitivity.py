"""Which products to keep in high precision: those whose quantization does the most damage per byte.

The damage is measured: the weights of one group at a time are replaced by what their quantized form dequantizes to,
in sessions over the unquantized graphs, whose weights are inputs with defaults. Nothing is exported again, no
session is opened twice, and only one group is in memory beside the model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.contracts import Progress
from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import open_model, serialized
from lora_export.onnx_export.graphs.matmuls import Product, candidates
from lora_export.onnx_export.quantize import gptq
from lora_export.onnx_export.quantize.feeding import Stage
from lora_export.onnx_export.quantize.numbers import dequantize, granularity, quantize, shapes
from lora_export.onnx_export.quantize.settings import GPTQ, Blockwise, chosen
from lora_export.onnx_export.quantize.statistics import Statistics
from lora_export.onnx_export.quantize.stored import StoredMatrices
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.dtypes import Array
from lora_export.onnx_export.weights.map import Part, Quantization, Recipe, Weight
from lora_export.runtime import session_options
from lora_export.storage.workers import BLOCK

BUDGET = 0.15  # of the bytes of all quantized weights
TOKENS = 256  # of texts that damage is measured on
MOST_GROUPS = 64  # each costs one run over all inputs
Solve = Callable[[Array], Mapping[Part, Array]]
_POSITIONS = 32  # whose distributions are compared at once
_LAYER = re.compile(r"\b(?:layers?|h|blocks?)[./](\d+)(?=[./])")
_FP32 = 4  # bytes
_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Damage:
    """A group of products. nodes: of the measured graphs; tensors: of the checkpoint, which their weights are made
    of; damage: to the outputs while only its weights are quantized (see `choose_kept`); nbytes: how much the model
    grows if they are kept; kept: whether to keep them."""

    name: str
    nodes: tuple[str, ...]
    damage: float
    nbytes: int
    kept: bool = False
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Quantized:
    """A weight that would be quantized. at: the stages whose graphs multiply by it; nodes: there; shared: whether
    rows of it are looked up as well."""

    product: Product
    at: tuple[int, ...]
    nodes: tuple[str, ...]
    shared: bool

    def settings(self, how: Blockwise) -> Blockwise:
        return how.of_table(self.product.rows, shared=True) if self.shared else how


@dataclass(frozen=True)
class _Group:
    name: str
    weights: tuple[_Quantized, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(node for weight in self.weights for node in weight.nodes)

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(sorted({tensor for weight in self.weights for tensor in weight.product.tensors}))


def choose_kept(
    stages: Sequence[Stage],
    how: Blockwise,
    *,
    logits: str | None = None,
    budget: float = BUDGET,
    eight_bits: bool = False,
    groups: int = MOST_GROUPS,
    statistics: Statistics | None = None,
    made: StoredMatrices | None = None,
    progress: Progress,
) -> tuple[Damage, ...]:
    """Every group of products with its damage, worst per byte first; `kept` marks those to name in `keep`, or in
    `eight_bits` if that is set: there, a byte buys about five times as much.

    stages: fp32 graphs of one export with its weights map, of the model to be quantized, and what they are fed
    with; damage is done to the outputs of the last. With `logits` (the name of one), it is the mean KL divergence
    of its distributions in nats; without, the mean over the outputs of the squared error relative to the squared
    output. Both are quadratic in the error of a weight, so that those of different groups roughly add up. budget:
    how much larger the weights may become, as a share of everything quantized. Groups that do less damage per byte
    than average are never kept. statistics: what gptq rounds by; made: of an export that is quantized so already,
    whose matrices are taken. ExportError if there is nothing to quantize.
    """
    folder = stages[0].graph.parent
    weights = weights_map.read(folder).weights
    models = [open_model(stage.graph) for stage in stages]
    chosen = _groups(_quantized(models, weights, how), groups)
    run = _Run(stages, models, chosen, logits)
    expected = [run(at, {}) for at in range(len(stages[-1].feeds))]
    wide = replace(how, method="int8") if eight_bits else None
    measured = []
    for done, group in enumerate(chosen):
        changed = dict(_simulated(folder, weight, how, statistics, made) for weight in group.weights)
        damage = float(np.mean([_damage(e, run(at, changed), logits) for at, e in enumerate(expected)]))
        if not np.isfinite(damage):
            raise ExportError(
                f"quantizing {group.name} produces outputs that are not finite numbers",
                where=stages[-1].graph,
                expected="inputs for which the fp32 model and the quantized one give finite numbers",
                next_step=f"--keep '{group.tensors[0]}', or measure with other texts",
            )
        grown = sum(_nbytes(w, wide) - _nbytes(w, how) for w in group.weights)
        measured.append(Damage(group.name, group.nodes, damage, grown, tensors=group.tensors))
        progress.advance(done + 1, len(chosen))
    quantized = sum(_nbytes(w, how) for g in chosen for w in g.weights)
    return mark(measured, int(budget * quantized))


def mark(measured: Sequence[Damage], budget: int) -> tuple[Damage, ...]:
    """The same groups, worst per byte first. Those that fit into `budget` (bytes) are `kept`, except those that do
    less damage per byte than average."""
    total = sum(m.damage for m in measured)
    average = total / max(1, sum(m.nbytes for m in measured))
    marked = []
    for one in sorted(measured, key=lambda m: m.damage / m.nbytes, reverse=True):
        keep = one.nbytes <= budget and one.damage > average * one.nbytes
        budget -= one.nbytes * keep
        marked.append(replace(one, kept=keep))
    return tuple(marked)


# --- groups ------------------------------------------------------------------------------------------------


def _quantized(models: Sequence[ir.Model], weights: Sequence[Weight], how: Blockwise) -> list[_Quantized]:
    """What is quantized of the graphs' weights, unless it is only looked up in."""
    products: dict[tuple[str, str], Product] = {}
    places: dict[tuple[str, str], list[tuple[int, str]]] = {}
    tables: set[tuple[str, str]] = set()
    for at, model in enumerate(models):
        stored = (value.const_value for value in model.graph.initializers.values())
        files = {str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}
        own = candidates(model, [w for w in weights if w.file in files], how.embeddings)
        skipped = chosen({node: product.tensors for node, product in own.items()}, (*how.keep, *how.eight_bits))
        for node, product in own.items():
            if node in skipped:
                continue
            key = product.weight.file, product.weight.name
            if product.lookup:
                tables.add(key)
                continue
            products.setdefault(key, product)
            places.setdefault(key, []).append((at, node))
    if not products:
        raise ExportError(
            "no product in this graph has a weight that can be quantized",
            expected="an fp32 export of a model with linear layers",
        )
    return [
        _Quantized(
            product,
            tuple(sorted({at for at, _ in places[key]})),
            tuple(node for _, node in places[key]),
            key in tables,
        )
        for key, product in products.items()
    ]


def _groups(quantized: Sequence[_Quantized], most: int) -> list[_Group]:
    """One group per weight; or, if there are too many, those with the same role in consecutive layers."""
    for layers in range(1, len(quantized) + 1):
        named: dict[str, list[_Quantized]] = {}
        for weight in quantized:
            named.setdefault(_group_name(weight.product, layers), []).append(weight)
        if len(named) <= most:
            break
    return [_Group(name, tuple(own)) for name, own in named.items()]


def _group_name(product: Product, layers: int) -> str:
    """The name of the weight's first tensor, with the first and last of `layers` layers in place of its own."""

    def together(match: re.Match[str]) -> str:
        first = int(match[1]) // layers * layers
        return f"{match[0][: -len(match[1])]}{first}-{first + layers - 1}"

    tensor = product.weight.recipe.pieces[0].tensor
    return tensor if layers == 1 else _LAYER.sub(together, tensor, count=1)


# --- measuring ---------------------------------------------------------------------------------------------


def _simulated(
    folder: Path, weight: _Quantized, how: Blockwise, statistics: Statistics | None, made: StoredMatrices | None
) -> tuple[tuple[str, str], Array]:
    """The key of a weight, and its value if the product is quantized."""
    product, stored = weight.product, weight.product.weight
    if stored.dtype != "float32":
        raise ExportError(f"{stored.name} is {stored.dtype}", tensor=stored.name, expected="an fp32 export")
    known = made.matrix(product) if made is not None else None
    if known is not None:
        return (stored.file, stored.name), np.ascontiguousarray(known.T) if product.turned else known
    matrix = np.memmap(folder / stored.file, np.float32, "r", stored.offset, stored.shape)
    matrix = matrix.T if product.turned else matrix
    own = weight.settings(how)
    solve = _solver(stored.recipe, own.settings, statistics) if own.algorithm == GPTQ else None
    value = _as_quantized(matrix, own.settings, solve)
    return (stored.file, stored.name), np.ascontiguousarray(value.T) if product.turned else value


def _solver(recipe: Recipe, how: Quantization, statistics: Statistics | None) -> Solve:
    """What gptq makes of columns; data-free where there are no statistics."""
    moment = statistics.moment(recipe) if statistics is not None else None
    dtype = np.dtype(np.float32)
    if moment is None:
        return lambda columns: gptq.rounded(columns, how, dtype)[0]
    solver = gptq.Solver(moment)
    return lambda columns: solver.quantize(columns, how, dtype)[0]


def _as_quantized(matrix: Array, how: Quantization, solve: Solve | None) -> Array:
    """The fp32 matrix (in, out) that the quantized operator multiplies by, computed a few columns at a time."""
    rows, columns = matrix.shape
    least = granularity(rows, how)
    step = max(1, BLOCK // (4 * rows * least)) * least if solve is None else gptq.COLUMNS
    out = np.empty(matrix.shape, np.float32)
    for start in range(0, columns, step):
        part = np.ascontiguousarray(matrix[:, start : start + step])
        arrays = quantize(part, how) if solve is None else solve(part)
        out[:, start : start + step] = dequantize(arrays, rows, part.shape[1], how)
    return out


def _nbytes(weight: _Quantized, how: Blockwise | None) -> int:
    """Bytes of a weight; None: in fp32."""
    product = weight.product
    if how is None:
        return _FP32 * product.rows * product.columns
    sizes = shapes(product.rows, product.columns, weight.settings(how).settings)
    return sum(int(np.prod(s)) * (_FP32 if part == "scales" else 1) for part, s in sizes.items())


class _Run:
    """Sessions over the graphs, one after another, in which weights can be replaced for one run."""

    def __init__(
        self, stages: Sequence[Stage], models: Sequence[ir.Model], groups: Sequence[_Group], logits: str | None
    ) -> None:
        import onnxruntime as ort

        self._stages, self._inputs, self._sessions = stages, [], []
        for at, (stage, model) in enumerate(zip(stages, models, strict=True)):
            inputs = {}
            for weight in (w for group in groups for w in group.weights if at in w.at):
                stored = weight.product.weight
                inputs[stored.file, stored.name] = _replaceable(model.graph, weight.product, weight.nodes)
            options = session_options()  # without its warnings of initializers that are inputs
            options.add_session_config_entry(_FOLDER, str(stage.graph.parent.resolve()))
            session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
            self._inputs.append(inputs)
            self._sessions.append(session)
        every = [output.name for output in self._sessions[-1].get_outputs()]
        self._outputs = every if logits is None else [logits]

    def __call__(self, number: int, changed: Mapping[tuple[str, str], Array]) -> dict[str, Array]:
        """The outputs of the last stage for a feed. changed: values of weights, by data file and name."""
        found: dict[str, Array] = {}
        for at, stage in enumerate(self._stages):
            last = at == len(self._stages) - 1
            names = self._outputs if last else [*stage.kept]
            own = {name: changed[key] for key, name in self._inputs[at].items() if key in changed}
            values = self._sessions[at].run(names, {**stage.feeds[number], **own})
            found = dict(zip(names, values, strict=True))
            for name, take in stage.kept.items():
                take(number, found[name])
        return found


def _replaceable(graph: ir.Graph, product: Product, nodes: Sequence[str]) -> str:
    """Turn an initializer into an input with a default; returns the input's name. A transposed one may also be an
    embedding, which stays."""
    value = graph.initializers[product.weight.name]
    if product.turned:
        stays, tensor = value, value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        name, shape = product.weight.name + "_of_product", tensor.shape
        place = tensor.location, tensor.offset, tensor.length
        default = ir.ExternalTensor(*place, tensor.dtype, shape=shape, name=name)
        value = ir.Value(name=name, type=stays.type, shape=shape, const_value=default)
        graph.register_initializer(value)
        for node, index in list(stays.uses()):
            if node.name in nodes and index == 1:
                node.replace_input_with(1, value)
    graph.inputs.append(value)
    return str(value.name)


def _damage(expected: Mapping[str, Array], changed: Mapping[str, Array], logits: str | None) -> float:
    if logits is not None:
        return _divergence(expected[logits], changed[logits])
    errors = []
    for name, value in expected.items():
        if value.dtype.kind == "f" and value.size:
            wanted = value.astype(np.float64)
            errors.append(float(np.sum((changed[name] - wanted) ** 2) / np.maximum(np.sum(wanted**2), 1e-30)))
    return float(np.mean(errors)) if errors else 0.0


def _divergence(expected: Array, changed: Array) -> float:
    """Mean KL(expected ‖ found) over positions, of logits in the last dimension, in nats."""
    from scipy.special import log_softmax

    first, second = (each.reshape(-1, each.shape[-1]) for each in (expected, changed))
    total = 0.0
    for start in range(0, len(first), _POSITIONS):  # in fp64, the logits of a text may be larger than the model
        wanted, other = (log_softmax(r[start : start + _POSITIONS].astype(np.float64), -1) for r in (first, second))
        total += float(np.sum(np.exp(wanted) * (wanted - other)))
    return total / len(first)
