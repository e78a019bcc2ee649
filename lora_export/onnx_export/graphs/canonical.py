"""A form of a graph that does not depend on names, the order of nodes, or the values of weights; and its hash.

Every value gets a digest: an input from its name and type; an initializer from its type, its shape and how often it
is used (two operators that share a weight read less memory than two weights); the output of an operator from the
operator, its attributes and the digests of its inputs. Steering constants also count by value (see
steering_constants.py), and so do all tensors in attributes, since no adapter changes one.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.operator_roles import since
from lora_export.onnx_export.graphs.steering_constants import steering_constants, subgraphs

_BLOCK = 1 << 20
SHOWN = 16  # elements; a larger constant is shown as a hash
_LOOKUPS, _PRODUCTS = ("Gather", "GatherBlockQuantized"), ("MatMul", "Gemm", "MatMulNBits", "FusedMatMul")
_VIEWS = ("Transpose", "Cast", "Reshape")


@dataclass(frozen=True)
class Node:
    """name: the node's own; operands: its constants in words, a dot for a computed value; attributes: names and
    values; digest: of the node and everything it depends on."""

    name: str
    operator: str
    operands: str
    attributes: tuple[tuple[str, str], ...]
    digest: str

    @property
    def local(self) -> str:
        """What the node is, wherever it is in the graph."""
        attributes = ", ".join(f"{key}={value}" for key, value in self.attributes)
        return f"{self.operator}({self.operands})" + (f" [{attributes}]" if attributes else "")


@dataclass(frozen=True)
class Canonical:
    """initializer_bytes: ONNX type → bytes in the stored model; tied: an initializer is used both as embedding
    table and as a factor of a product; placement: provider → nodes."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    initializer_bytes: Mapping[str, int]
    tied: bool
    placement: Mapping[str, int]

    @property
    def sha256(self) -> str:
        parts = [*sorted(self.inputs), *sorted(n.digest for n in self.nodes), *sorted(self.outputs)]
        return _digest(*parts, *(f"{provider} {n}" for provider, n in sorted(self.placement.items())))


def canonical(model: ir.Model, placement: Mapping[str, int], stored: ir.Model | None = None) -> Canonical:
    """placement: how many nodes a session assigned to each provider, which is part of the hash; stored: the model
    that this one was optimized from, whose weights do not yet have the types that the provider wants."""
    graph, written = model.graph, (stored or model).graph
    form = _Form(model)
    values: dict[ir.Value, str] = {}
    nodes = tuple(form.nodes(graph, values))
    kinds: Counter[str] = Counter()
    for value in written.initializers.values():
        if value.const_value is not None:
            kinds[value.const_value.dtype.name] += value.const_value.nbytes
    return Canonical(
        inputs=tuple(values[v] for v in graph.inputs),
        nodes=nodes,
        outputs=tuple(_digest("output", str(v.name), _type(v), values.get(v, "")) for v in graph.outputs),
        initializer_bytes=dict(kinds),
        tied=_is_tied(written),
        placement=dict(placement),
    )


class _Form:
    """Digests of everything in a model, graph by graph."""

    def __init__(self, model: ir.Model) -> None:
        self._steering = steering_constants(model)
        self._versions = model.graph.opset_imports
        self._functions = {
            (f.domain, f.name): ir.to_proto(f).SerializeToString(deterministic=True)
            for f in model.functions.values()
        }

    def nodes(self, graph: ir.Graph, values: dict[ir.Value, str], *, inner: bool = False) -> Iterator[Node]:
        """Yields the nodes and adds the digest of every value to `values`, which already has those of the enclosing
        graphs.

        inner: whether inputs count by position, because their names mean nothing outside.
        """
        constants = {v: self._constant(v) for v in graph.initializers.values() if v.const_value is not None}
        uses = Counter(value for node in graph for value in node.inputs)
        for i, given in enumerate(graph.inputs):
            values[given] = _digest("input", str(i) if inner else str(given.name), _type(given))
        for value, words in constants.items():
            digest = _digest("tensor", words, str(uses.get(value, 0)))
            values[value] = _digest(values[value], "unless given", digest) if value.is_graph_input() else digest
        for node in graph:
            operator = f"{node.domain or 'ai.onnx'}.{node.op_type}"
            attributes = tuple(sorted((a.name, self._attribute(a, values)) for a in node.attributes.values()))
            digest = _digest(
                operator,
                str(since(node, self._versions)),
                *self._function(node),
                *(f"{key}={value}" for key, value in attributes),
                "from",
                *("" if value is None else values.get(value, "") for value in node.inputs),
            )
            for k, made in enumerate(node.outputs):
                values[made] = _digest(digest, str(k))
            shown = ", ".join("-" if v is None else constants.get(v, "·") for v in node.inputs)
            yield Node(str(node.name or ""), operator, shown, attributes, digest)

    def _constant(self, value: ir.Value) -> str:
        assert value.const_value is not None
        return _in_words(value.const_value, by_value=value in self._steering)

    def _function(self, node: ir.Node) -> tuple[str, ...]:
        body = self._functions.get((node.domain, node.op_type))
        return () if body is None else (hashlib.sha256(body).hexdigest(),)

    def _attribute(self, attribute: ir.Attr, values: Mapping[ir.Value, str]) -> str:
        if attribute.is_ref():
            return f"reference {attribute.ref_attr_name}"
        if attribute.type == ir.AttributeType.TENSOR:
            return _in_words(attribute.as_tensor(), by_value=True)
        graphs = subgraphs(attribute)
        return " ".join(self._graph(g, values) for g in graphs) if graphs else _plain(attribute.value)

    def _graph(self, graph: ir.Graph, values: Mapping[ir.Value, str]) -> str:
        inside = dict(values)
        digests = sorted(n.digest for n in self.nodes(graph, inside, inner=True))
        ends = [inside.get(v, "") for v in graph.outputs]
        return f"graph {_digest(*digests, 'to', *ends)[:16]}"


def _plain(value: object) -> str:
    """An attribute as text, like ONNX's own helper: strings as bytes, several values as a list."""
    if isinstance(value, str):
        return repr(value.encode())
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, tuple | list) else repr(value)


def _in_words(tensor: ir.TensorProtocol, *, by_value: bool) -> str:
    words = f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())}"
    if not by_value:
        return words
    if isinstance(tensor, ir.ExternalTensor):
        return f"{words}={_hash_stored(tensor)}"
    values = tensor.numpy()
    if values.size <= SHOWN or values.dtype == object:  # texts
        return f"{words}={values.tolist()}"
    return f"{words}={hashlib.sha256(values.tobytes()).hexdigest()}"


def _hash_stored(tensor: ir.ExternalTensor) -> str:
    if not tensor.base_dir:
        raise ExportError(
            "a steering constant is stored in another file",
            tensor=tensor.name,
            expected=f"the folder of {tensor.location}",
        )
    digest, left = hashlib.sha256(), tensor.nbytes
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        while left and (block := file.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _is_tied(graph: ir.Graph) -> bool:
    source: dict[ir.Value | None, ir.Value] = {v: v for v in graph.initializers.values()}
    for node in graph:
        if node.op_type in _VIEWS and node.inputs[0] in source:
            source[node.outputs[0]] = source[node.inputs[0]]

    def fed(operators: Iterable[str]) -> set[ir.Value]:
        values = (value for node in graph if node.op_type in operators for value in node.inputs[:2])
        return {source[value] for value in values if value in source}

    return bool(fed(_LOOKUPS) & fed(_PRODUCTS))


def _type(value: ir.Value) -> str:
    name = value.dtype.name.lower() if value.dtype is not None else "undefined"
    shape = value.shape if value.shape is not None else ()
    return f"{name}{[size if isinstance(size, int) else size.value or 0 for size in shape]}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
