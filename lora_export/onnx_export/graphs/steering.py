"""Which constants of a graph decide how much work it does, found backwards from every input that steers.

A constant counts by value

1. if an input that decides an amount of work depends on it: a condition, a trip count, a shape, a length. All that
   the input is computed from belongs to it, arithmetic and products of matrices included. Where a branch depends on
   what the weights compute, another adapter may take the other branch, so such weights count by value as well.
2. if an index depends on it and no activation lies between. An index that activations choose (the best token, the
   best experts) reads one of equally many rows, so the weights behind it remain weights.
3. if it is an integer, a boolean or a text, unless it is the operand of a quantized product.
4. if it is a floating-point number without dimensions, unless it belongs to a quantization. No layer has such a
   weight; base and merged graph have it from the same exporter and the same configuration.
5. if it is small and goes into an operator that neither ONNX nor ONNX Runtime defines.

Shape and Size depend on none of the numbers of their input, so the search ends there.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lora_export.onnx_export.graphs.operators import (
    PRODUCTS,
    SHAPES,
    is_foreign,
    is_quantized,
    is_steering,
    keeps_type,
    role,
)

if TYPE_CHECKING:
    import onnx

SMALL = 64  # elements of a constant of an unknown operator


class Value(NamedTuple):
    """scope: the way to the subgraph, empty for the main graph; name: as the graph has it."""

    scope: str
    name: str


def subgraphs(attribute: "onnx.AttributeProto", scope: str, node: int) -> Iterator[tuple[str, "onnx.GraphProto"]]:
    """The graphs in an attribute of the node with that number, each with its scope."""
    graphs = [attribute.g] if attribute.HasField("g") else []
    for i, graph in enumerate((*graphs, *attribute.graphs)):
        yield f"{scope}/{node}.{attribute.name}.{i}", graph


def steering_constants(model: "onnx.ModelProto") -> frozenset[Value]:
    """The initializers of the graph and its subgraphs that count by value."""
    flow = _Flow({o.domain: o.version for o in model.opset_import})
    flow.add(model.graph, "", {})
    found = flow.behind(flow.work) | flow.behind(flow.choices, end=flow.activations())
    return frozenset(v for v, t in flow.constants.items() if v in found or flow.is_setting(v, t))


class _Flow:
    """sources: value → what it is computed from; work, choices: values that steer; uses: constant → its operators
    and whether it multiplies a scale found at run time."""

    def __init__(self, versions: Mapping[str, int]) -> None:
        self.work: set[Value] = set()
        self.choices: set[Value] = set()
        self.constants: dict[Value, onnx.TensorProto] = {}
        self._versions = versions
        self._sources: dict[Value, list[Value]] = defaultdict(list)
        self._types: dict[Value, int] = {}
        self._products: list[Value] = []
        self._scales: set[Value] = set()
        self._uses: dict[Value, list[tuple[onnx.NodeProto, tuple[Value, ...]]]] = defaultdict(list)

    # --- building ------------------------------------------------------------------------------------------

    def add(self, graph: "onnx.GraphProto", scope: str, outer: Mapping[str, Value]) -> dict[str, Value]:
        """Everything in a graph; its names, with those of the graphs around it."""
        names = dict(outer)
        for value in (*graph.value_info, *graph.output, *graph.input):
            self._types[Value(scope, value.name)] = value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            self.constants[Value(scope, tensor.name)] = tensor
            self._types[Value(scope, tensor.name)] = tensor.data_type
        own = (*(v.name for v in graph.input), *(t.name for t in graph.initializer))
        names |= {name: Value(scope, name) for name in own}
        for i, node in enumerate(graph.node):
            self._add_node(node, i, scope, names)
        return names

    def _add_node(self, node: "onnx.NodeProto", number: int, scope: str, names: dict[str, Value]) -> None:
        inputs = tuple(names[name] if name in names else Value(scope, name) for name in node.input)
        outputs = [Value(scope, name) for name in node.output]
        for i, value in enumerate(inputs):
            if node.input[i]:
                self._add_use(node, i, value, inputs)
        graphs = [found for a in node.attribute for found in subgraphs(a, scope, number)]
        if graphs:
            for inside, graph in graphs:
                inner = self.add(graph, inside, names)
                starts = [inner[v.name] for v in graph.input]
                ends = [inner.get(v.name, Value(inside, v.name)) for v in graph.output]
                self._connect(node, inputs, outputs, starts, ends)
        elif node.op_type not in SHAPES:
            for value in outputs:
                self._depend(value, inputs)
        if node.op_type in PRODUCTS:
            self._products += outputs
        if node.op_type == "DynamicQuantizeLinear":
            self._scales.update(outputs[1:2])
        if node.op_type == "Cast":  # those that ONNX Runtime inserts have no type in the graph
            self._types[outputs[0]] = next((a.i for a in node.attribute if a.name == "to"), 0)
        elif inputs and keeps_type(node, self._versions):
            for value in outputs:
                self._types[value] = self._types.get(value) or self._types.get(inputs[0], 0)
        names |= {v.name: v for v in outputs if v.name}

    def _add_use(self, node: "onnx.NodeProto", position: int, value: Value, inputs: tuple[Value, ...]) -> None:
        self._uses[value].append((node, inputs))
        found = role(node, position, self._types.get(value, 0), self._versions)
        if found == "work":
            self.work.add(value)
        elif found == "choice":
            self.choices.add(value)

    def _connect(
        self,
        node: "onnx.NodeProto",
        inputs: tuple[Value, ...],
        outputs: list[Value],
        starts: list[Value],
        ends: list[Value],
    ) -> None:
        """How values go into a subgraph and out of it. starts, ends: the subgraph's inputs and outputs."""
        if node.op_type == "If":
            self._pair(outputs, ends)
        elif node.op_type == "Loop":
            self.work.add(ends[0])
            self._pair(starts[1:], inputs[1:])
            self._pair(starts[1:], ends[: len(starts) - 1])
            self._pair(outputs, ends[1:])
            self._pair(outputs, inputs[2:])
        elif node.op_type == "Scan" and len(inputs) == len(starts):
            self._pair(starts, inputs)
            scanned = next(a.i for a in node.attribute if a.name == "num_scan_inputs")
            self._pair(starts[: len(starts) - scanned], ends)
            self._pair(outputs, ends)
        else:
            self.work.update(ends)
            for value in (*starts, *outputs):
                self._depend(value, (*inputs, *ends))

    def _pair(self, values: Iterable[Value], sources: Iterable[Value]) -> None:
        for value, source in zip(values, sources, strict=False):
            self._depend(value, (source,))

    def _depend(self, value: Value, sources: Iterable[Value]) -> None:
        if value.name:  # an output that is left out has no name, and so has an input that is left out
            self._sources[value] += sources

    # --- asking --------------------------------------------------------------------------------------------

    def behind(self, values: Iterable[Value], end: frozenset[Value] = frozenset()) -> set[Value]:
        """These values and all that they are computed from; not what lies behind those in `end`."""
        found: set[Value] = set()
        waiting = [v for v in values if v not in end]
        while waiting:
            value = waiting.pop()
            if value not in found:
                found.add(value)
                waiting += (v for v in self._sources.get(value, ()) if v not in end)
        return found

    def activations(self) -> frozenset[Value]:
        """What products of matrices make, and all that is computed from it."""
        onwards: dict[Value, list[Value]] = defaultdict(list)
        for value, sources in self._sources.items():
            for source in sources:
                onwards[source].append(value)
        found: set[Value] = set()
        waiting = list(self._products)
        while waiting:
            value = waiting.pop()
            if value not in found:
                found.add(value)
                waiting += onwards.get(value, ())
        return frozenset(found)

    def is_setting(self, value: Value, tensor: "onnx.TensorProto") -> bool:
        """Whether a constant is of the architecture and not a weight, by what it is and where it goes."""
        uses = self._uses.get(value, [])
        if is_steering(tensor.data_type):
            return not (uses and all(is_quantized(node) for node, _ in uses))
        if any(is_foreign(node) for node, _ in uses):
            return bool(math.prod(tensor.dims) <= SMALL)
        return len(tensor.dims) == 0 and _is_floating(tensor) and not any(self._scales_by(*use) for use in uses)

    def _scales_by(self, node: "onnx.NodeProto", inputs: tuple[Value, ...]) -> bool:
        return is_quantized(node) or (node.op_type == "Mul" and any(v in self._scales for v in inputs))


def _is_floating(tensor: "onnx.TensorProto") -> bool:
    import onnx

    return onnx.TensorProto.DataType.Name(tensor.data_type) in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
