"""A graph in a form that no names, no order of nodes and no weights' values change, and a hash of it.

Each value of the graph gets a digest: of an input its name and type, of an initializer its type, shape and how
often it is used (one weight that two operators share is less memory to read than two), of an operator's output the
operator, its attributes and the digests of what goes in. Values count for small integer constants only, which are
shapes, axes and indices.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

SMALL_CONSTANT = 64  # elements; shapes, axes and indices are that small, weights are not
_LOOKUPS, _PRODUCTS = ("Gather", "GatherBlockQuantized"), ("MatMul", "Gemm", "MatMulNBits", "FusedMatMul")
_VIEWS = ("Transpose", "Cast")
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "FLOAT16": 16, "BFLOAT16": 16, "INT16": 16, "UINT16": 16,
         "FLOAT": 32, "INT32": 32, "UINT32": 32, "DOUBLE": 64, "INT64": 64, "UINT64": 64}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """name: its own; operands: its constants in words, a dot for what is computed; attributes: name and value;
    digest: of it and all that it depends on."""

    name: str
    operator: str
    operands: str
    attributes: tuple[tuple[str, str], ...]
    digest: str

    @property
    def local(self) -> str:
        """What it is, wherever it stands."""
        attributes = ", ".join(f"{key}={value}" for key, value in self.attributes)
        return f"{self.operator}({self.operands})" + (f" [{attributes}]" if attributes else "")


@dataclass(frozen=True)
class Canonical:
    """initializer_bytes: of the stored model, ONNX type → bytes; tied: one of its initializers is both looked up as
    embedding and multiplied with; placement: provider → nodes."""

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


def canonical(
    model: "onnx.ModelProto", placement: Mapping[str, int], stored: "onnx.ModelProto | None" = None
) -> Canonical:
    """placement: how many nodes a session gave to each provider, which is part of what is hashed; stored: the model
    that this one was optimized from, whose weights are not yet in the types that a provider wants them in."""
    graph, written = model.graph, (stored or model).graph
    values = {v.name: _digest("input", v.name, _type(v)) for v in graph.input}
    uses = Counter(name for node in graph.node for name in node.input)
    nodes = tuple(_nodes(graph, values, uses))
    kinds: Counter[str] = Counter()
    for tensor in written.initializer:
        kinds[_kind(tensor)] += _nbytes(tensor)
    return Canonical(
        inputs=tuple(values[v.name] for v in graph.input),
        nodes=nodes,
        outputs=tuple(_digest("output", v.name, _type(v), values[v.name]) for v in graph.output),
        initializer_bytes=dict(kinds),
        tied=_is_tied(written),
        placement=dict(placement),
    )


def _nodes(graph: "onnx.GraphProto", values: dict[str, str], uses: Mapping[str, int]) -> Iterator[Node]:
    """Adds the digest of everything that is computed to `values`."""
    constants = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
    for name, words in constants.items():
        values.setdefault(name, _digest("tensor", words, str(uses.get(name, 0))))
    for node in graph.node:
        operator = f"{node.domain or 'ai.onnx'}.{node.op_type}"
        attributes = tuple(sorted((a.name, _attribute(a, values)) for a in node.attribute))
        inputs = [values.get(name, "") for name in node.input]
        digest = _digest(operator, *(f"{key}={value}" for key, value in attributes), "from", *inputs)
        for i, name in enumerate(node.output):
            values[name] = _digest(digest, str(i)) if name else ""
        shown = ", ".join(constants.get(name, "·" if name else "-") for name in node.input)
        yield Node(node.name, operator, shown, attributes, digest)


def _attribute(attribute: "onnx.AttributeProto", values: Mapping[str, str]) -> str:
    import onnx

    kind = onnx.AttributeProto
    if attribute.type == kind.TENSOR:
        return _tensor(attribute.t)
    if attribute.type == kind.GRAPH:
        inner = dict(values) | {v.name: _digest("input", _type(v)) for v in attribute.g.input}
        uses = Counter(name for node in attribute.g.node for name in node.input)
        digests = sorted(n.digest for n in _nodes(attribute.g, inner, uses))
        ends = [inner.get(v.name, "") for v in attribute.g.output]
        return f"graph {_digest(*digests, 'to', *ends)[:16]}"
    return repr(onnx.helper.get_attribute_value(attribute))


def _tensor(tensor: "onnx.TensorProto") -> str:
    import onnx

    words = f"{_kind(tensor).lower()}{list(tensor.dims)}"
    integer = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    inline = tensor.data_location != onnx.TensorProto.EXTERNAL
    if integer and inline and math.prod(tensor.dims) <= SMALL_CONSTANT:
        return f"{words}={onnx.numpy_helper.to_array(tensor).tolist()}"
    return words


def _kind(tensor: "onnx.TensorProto") -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(tensor.data_type))


def _nbytes(tensor: "onnx.TensorProto") -> int:
    bits = math.prod(tensor.dims) * _BITS.get(_kind(tensor), 8)
    return int(bits) // 8


def _is_tied(graph: "onnx.GraphProto") -> bool:
    source = {t.name: t.name for t in graph.initializer}
    for node in graph.node:
        if node.op_type in _VIEWS and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]

    def fed(operators: Iterable[str]) -> set[str]:
        names = (name for node in graph.node if node.op_type in operators for name in node.input[:2])
        return {source[name] for name in names if name in source}

    return bool(fed(_LOOKUPS) & fed(_PRODUCTS))


def _type(value: "onnx.ValueInfoProto") -> str:
    import onnx

    tensor = value.type.tensor_type
    dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}{dims}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
