"""A graph in a form that no names, no order of nodes and no weights' values change, and a hash of it.

Each value of the graph gets a digest: of an input its name and type, of an initializer its type, shape and how
often it is used (one weight that two operators share is less memory to read than two), of an operator's output the
operator, its attributes and the digests of what goes in. A constant that steers counts by value as well:
steering.py says which do. All tensors in attributes count by value, since no adapter changes one.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.operators import since
from lora_export.onnx_export.graphs.steering import Value, steering_constants, subgraphs

if TYPE_CHECKING:
    import onnx

_BLOCK = 1 << 20
SHOWN = 16  # elements of a constant that are written out; of a larger one, its hash
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
    model: "onnx.ModelProto",
    placement: Mapping[str, int],
    stored: "onnx.ModelProto | None" = None,
    folder: Path | None = None,
) -> Canonical:
    """placement: how many nodes a session gave to each provider, which is part of what is hashed; stored: the model
    that this one was optimized from, whose weights are not yet in the types that a provider wants them in; folder:
    where the data files of `model` lie, for the few constants there that count by value."""
    graph, written = model.graph, (stored or model).graph
    form = _Form(model, folder)
    values: dict[str, str] = {}
    nodes = tuple(form.nodes(graph, "", values))
    kinds: Counter[str] = Counter()
    for tensor in written.initializer:
        kinds[_kind(tensor)] += _nbytes(tensor)
    return Canonical(
        inputs=tuple(values[v.name] for v in graph.input),
        nodes=nodes,
        outputs=tuple(_digest("output", v.name, _type(v), values.get(v.name, "")) for v in graph.output),
        initializer_bytes=dict(kinds),
        tied=_is_tied(written),
        placement=dict(placement),
    )


class _Form:
    """Digests of everything in a model, graph by graph."""

    def __init__(self, model: "onnx.ModelProto", folder: Path | None) -> None:
        self._steering = steering_constants(model)
        self._versions = {o.domain: o.version for o in model.opset_import}
        self._functions = {(f.domain, f.name): f.SerializeToString(deterministic=True) for f in model.functions}
        self._folder = folder

    def nodes(self, graph: "onnx.GraphProto", scope: str, values: dict[str, str]) -> Iterator[Node]:
        """Adds the digest of everything in the graph to `values`, which has that of everything around it."""
        constants = self._constants(graph, scope)
        uses = Counter(name for node in graph.node for name in node.input)
        for i, given in enumerate(graph.input):  # an inner graph's inputs have a place, and names of no meaning
            values[given.name] = _digest("input", str(i) if scope else given.name, _type(given))
        for name, words in constants.items():
            digest = _digest("tensor", words, str(uses.get(name, 0)))
            is_default = any(name == given.name for given in graph.input)
            values[name] = _digest(values[name], "unless given", digest) if is_default else digest
        for i, node in enumerate(graph.node):
            operator = f"{node.domain or 'ai.onnx'}.{node.op_type}"
            attributes = tuple(sorted((a.name, self._attribute(a, scope, i, values)) for a in node.attribute))
            digest = _digest(
                operator,
                str(since(node, self._versions)),
                *self._function(node),
                *(f"{key}={value}" for key, value in attributes),
                "from",
                *(values.get(name, "") for name in node.input),
            )
            for k, name in enumerate(node.output):
                values[name] = _digest(digest, str(k)) if name else ""
            shown = ", ".join(constants.get(name, "·" if name else "-") for name in node.input)
            yield Node(node.name, operator, shown, attributes, digest)

    def _constants(self, graph: "onnx.GraphProto", scope: str) -> dict[str, str]:
        """The initializers in words, by name. One that is stored sparsely counts by value."""
        found = {
            t.name: self._tensor(t, by_value=Value(scope, t.name) in self._steering) for t in graph.initializer
        }
        for sparse in graph.sparse_initializer:
            parts = (self._tensor(t, by_value=True) for t in (sparse.values, sparse.indices))
            found[sparse.values.name] = f"sparse {list(sparse.dims)} {' at '.join(parts)}"
        return found

    def _function(self, node: "onnx.NodeProto") -> tuple[str, ...]:
        body = self._functions.get((node.domain, node.op_type))
        return () if body is None else (hashlib.sha256(body).hexdigest(),)

    def _attribute(self, attribute: "onnx.AttributeProto", scope: str, node: int, values: Mapping[str, str]) -> str:
        import onnx

        kind = onnx.AttributeProto
        if attribute.type == kind.TENSOR:
            return self._tensor(attribute.t, by_value=True)
        if attribute.type in (kind.GRAPH, kind.GRAPHS):
            return " ".join(self._graph(g, inner, values) for inner, g in subgraphs(attribute, scope, node))
        return repr(onnx.helper.get_attribute_value(attribute))

    def _graph(self, graph: "onnx.GraphProto", scope: str, values: Mapping[str, str]) -> str:
        inner = dict(values)
        digests = sorted(n.digest for n in self.nodes(graph, scope, inner))
        ends = [inner.get(v.name, "") for v in graph.output]
        return f"graph {_digest(*digests, 'to', *ends)[:16]}"

    def _tensor(self, tensor: "onnx.TensorProto", *, by_value: bool) -> str:
        import onnx

        words = f"{_kind(tensor).lower()}{list(tensor.dims)}"
        if not by_value:
            return words
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return f"{words}={self._hash_stored(tensor)}"
        values = onnx.numpy_helper.to_array(tensor)
        if values.size <= SHOWN or values.dtype == object:  # texts
            return f"{words}={values.tolist()}"
        return f"{words}={hashlib.sha256(values.tobytes()).hexdigest()}"

    def _hash_stored(self, tensor: "onnx.TensorProto") -> str:
        entries = {e.key: e.value for e in tensor.external_data}
        if self._folder is None:
            raise ExportError(
                "a constant that decides what the graph does lies in another file",
                tensor=tensor.name,
                expected=f"the folder of {entries.get('location')}",
            )
        digest = hashlib.sha256()
        left = _nbytes(tensor)
        with (self._folder / entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            while left and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()


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
