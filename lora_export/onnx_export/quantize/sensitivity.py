"""Which products to keep in high precision: those whose quantization does the most damage per byte.

The damage is measured: the weights of one group at a time are replaced by what their quantized form dequantizes to,
in one session over the unquantized graph, whose weights are inputs with defaults. Nothing is exported again, no
session is opened twice, and only one group is in memory beside the model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.contracts import Progress
from lora_export.errors import ExportError
from lora_export.graph_runs.feeds import Feed
from lora_export.onnx_export.graphs.checks import open_model, serialized
from lora_export.onnx_export.graphs.matmuls import Product, candidates
from lora_export.onnx_export.quantize.numbers import dequantize, granularity, quantize, shapes
from lora_export.onnx_export.quantize.settings import Blockwise
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.dtypes import ONNX, Array
from lora_export.onnx_export.weights.map import Part, Piece, Weight
from lora_export.runtime import session_options
from lora_export.storage.workers import BLOCK

BUDGET = 0.15  # of the bytes of all quantized weights
MOST_GROUPS = 64  # each costs one run over all inputs
_LAYER = re.compile(r"(?<=[./])(?:layers?|h|blocks?)[./](\d+)(?=[./])")
_FP32 = 4  # bytes
_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Damage:
    """A group of products. damage: to the outputs while only its weights are quantized (see `choose_kept`); nbytes:
    how much the model grows if they are kept; kept: whether to keep them; tensors: of the checkpoint that its
    weights are made of."""

    name: str
    nodes: tuple[str, ...]
    damage: float
    nbytes: int
    kept: bool = False
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Group:
    name: str
    nodes: tuple[str, ...]
    products: tuple[Product, ...]  # of different weights

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.tensor for w in self.products for p in w.weight.recipe.pieces))


def choose_kept(
    model: Path,
    how: Blockwise,
    feeds: Sequence[Feed],
    *,
    logits: str | None = None,
    budget: float = BUDGET,
    eight_bits: bool = False,
    groups: int = MOST_GROUPS,
    made: Path | None = None,
    progress: Progress,
) -> tuple[Damage, ...]:
    """Every group of products with its damage, worst per byte first; `kept` marks those to name in `keep`, or in
    `eight_bits` if that is set: there, a byte buys about five times as much.

    model: an fp32 export with its weights map, of the graph to be quantized; feeds: inputs of the graph. damage:
    with `logits` (the name of an output), the mean KL divergence of its distributions in nats; without, the mean
    over the outputs of the squared error relative to the squared output. Both are quadratic in the error of a
    weight, so that those of different groups roughly add up. budget: how much larger the weights may become, as a
    share of everything quantized. Groups that do less damage per byte than average are never kept. made: a quantized
    export of the same numbers, whose own are taken where it has them. ExportError if the model has no weights map,
    or nothing to quantize.
    """
    graph = open_model(model)
    chosen = _groups(graph, weights_map.read(model.parent).weights, groups)
    run = _Run(model, graph, chosen, Quantized.of(made) if made else None)
    expected = [run(feed, {}) for feed in feeds]
    wide = replace(how, method="int8") if eight_bits else None
    measured = []
    for done, group in enumerate(chosen):
        changed = dict(run.simulated(p, how) for p in group.products)
        damage = float(np.mean([_damage(e, run(f, changed), logits) for e, f in zip(expected, feeds, strict=True)]))
        if not np.isfinite(damage):
            raise ExportError(
                f"quantizing {group.name} produces outputs that are not finite numbers",
                where=model,
                expected="inputs for which the fp32 model and the quantized one give finite numbers",
                next_step=f"--keep {group.name}, or measure with other texts",
            )
        grown = sum(_nbytes(p, wide) - _nbytes(p, how) for p in group.products)
        measured.append(Damage(group.name, group.nodes, damage, grown, tensors=group.tensors))
        progress.advance(done + 1, len(chosen))
    quantized = sum(_nbytes(p, how) for g in chosen for p in g.products)
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


def _groups(graph: ir.Model, weights: Sequence[Weight], most: int) -> list[_Group]:
    """Products in groups: one per weight; or, if there are too many, those with the same role in consecutive
    layers."""
    nodes: dict[str, list[str]] = {}
    products: dict[str, Product] = {}
    for node, product in candidates(graph, weights).items():
        nodes.setdefault(product.weight.name, []).append(node)
        products[product.weight.name] = product
    if not nodes:
        raise ExportError(
            "no product in this graph has a weight that can be quantized",
            expected="an fp32 export of a model with linear layers",
        )
    for layers in range(1, len(nodes) + 1):
        named: dict[str, list[str]] = {}
        for weight in nodes:
            named.setdefault(_group_name(nodes[weight][0], layers), []).append(weight)
        if len(named) <= most:
            break
    return [
        _Group(name, tuple(n for w in own for n in nodes[w]), tuple(products[w] for w in own))
        for name, own in named.items()
    ]


def _group_name(node: str, layers: int) -> str:
    """The node's name, with the first and last of `layers` layers in place of its own."""

    def together(match: re.Match[str]) -> str:
        first = int(match[1]) // layers * layers
        return f"{match[0][: -len(match[1])]}{first}-{first + layers - 1}"

    return node if layers == 1 else _LAYER.sub(together, node, count=1)


# --- measuring ---------------------------------------------------------------------------------------------


def _simulated(matrix: Array, how: Blockwise) -> Array:
    """The fp32 matrix (in, out) that the quantized operator multiplies by, computed a few columns at a time."""
    settings, (rows, columns) = how.settings, matrix.shape
    least = granularity(rows, settings)
    step = max(1, BLOCK // (4 * rows * least)) * least
    out = np.empty(matrix.shape, np.float32)
    for start in range(0, columns, step):
        part = np.ascontiguousarray(matrix[:, start : start + step])
        out[:, start : start + step] = dequantize(quantize(part, settings), rows, part.shape[1], settings)
    return out


def _nbytes(product: Product, how: Blockwise | None) -> int:
    """Bytes of a product's weight; None: in fp32."""
    if how is None:
        return _FP32 * product.rows * product.columns
    sizes = shapes(product.rows, product.columns, how.settings)
    return sum(int(np.prod(s)) * (_FP32 if part == "scales" else 1) for part, s in sizes.items())


@dataclass(frozen=True)
class Quantized:
    """The matrices that the products of an export multiply by, of what its data files hold. parts: by the pieces
    that a matrix is made of, and whether they are turned."""

    folder: Path
    parts: Mapping[tuple[tuple[Piece, ...], bool], Mapping[Part, Weight]]

    @classmethod
    def of(cls, folder: Path) -> "Quantized":
        parts: dict[tuple[tuple[Piece, ...], bool], dict[Part, Weight]] = {}
        for weight in weights_map.read(folder).weights:
            if (how := weight.recipe.quantized) is not None:
                key = weight.recipe.pieces, weight.recipe.transposed
                parts.setdefault(key, {})[how.part] = weight
        return cls(folder, parts)

    def matrix(self, product: Product) -> Array | None:
        """(in, out) in fp32, as it is dequantized; None for one that the export does not quantize."""
        recipe = product.weight.recipe
        parts = self.parts.get((recipe.pieces, recipe.transposed != product.turned))
        if parts is None:
            return None
        how = parts["packed"].recipe.quantized
        assert how is not None
        arrays: dict[Part, Array] = {
            part: np.fromfile(self.folder / w.file, ONNX[w.dtype], int(np.prod(w.shape)), offset=w.offset).reshape(w.shape)
            for part, w in parts.items()
        }
        return dequantize(arrays, product.rows, product.columns, how)


class _Run:
    """A session over the graph in which the weights of some products can be replaced for one run."""

    def __init__(
        self, path: Path, model: ir.Model, groups: Sequence[_Group], made: "Quantized | None" = None
    ) -> None:
        import onnxruntime as ort

        self._folder, self._made = path.parent, made
        for group in groups:
            for product in group.products:
                _replaceable(model.graph, product, group.nodes)
        options = session_options()  # without its warnings of initializers that are inputs and cannot be folded
        options.add_session_config_entry(_FOLDER, str(path.parent.resolve()))
        self._session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
        self._outputs = [o.name for o in self._session.get_outputs()]

    def __call__(self, feed: Feed, changed: Mapping[str, Array]) -> dict[str, Array]:
        values = self._session.run(self._outputs, {**feed, **changed})
        return dict(zip(self._outputs, values, strict=True))

    def simulated(self, product: Product, how: Blockwise) -> tuple[str, Array]:
        """An input of the session, and its value if the product is quantized."""
        weight = product.weight
        if weight.dtype != "float32":
            raise ExportError(f"{weight.name} is {weight.dtype}", tensor=weight.name, expected="an fp32 export")
        known = self._made.matrix(product) if self._made else None
        if known is not None:
            return _input_name(product), np.ascontiguousarray(known.T) if product.turned else known
        stored = np.memmap(self._folder / weight.file, np.float32, "r", weight.offset, weight.shape)
        if not product.turned:
            return _input_name(product), _simulated(stored, how)
        return _input_name(product), np.ascontiguousarray(_simulated(stored.T, how).T)


def _input_name(product: Product) -> str:
    return product.weight.name + "_of_product" * product.turned


def _replaceable(graph: ir.Graph, product: Product, nodes: Sequence[str]) -> None:
    """Turn an initializer into an input with a default. A transposed one is also an embedding, which stays."""
    value = graph.initializers[product.weight.name]
    if product.turned:
        stays, tensor = value, value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        name, shape = _input_name(product), tensor.shape
        place = tensor.location, tensor.offset, tensor.length
        default = ir.ExternalTensor(*place, tensor.dtype, shape=shape, name=name)
        value = ir.Value(name=name, type=stays.type, shape=shape, const_value=default)
        graph.register_initializer(value)
        for node, index in list(stays.uses()):
            if node.name in nodes and index == 1:
                node.replace_input_with(1, value)
    graph.inputs.append(value)


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

    wanted, other = (log_softmax(logits.astype(np.float64), -1) for logits in (expected, changed))
    return float(np.mean(np.sum(np.exp(wanted) * (wanted - other), axis=-1)))
