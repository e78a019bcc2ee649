"""Which constants of a graph decide how much work it does, found backwards from every input that steers.

A constant counts by value

1. if an input that decides an amount of work depends on it: a condition, a trip count, a shape, a length. This
   includes everything the input is computed from, arithmetic and matrix products too. Where a branch depends on
   what the weights compute, another adapter may take the other branch, so such weights also count by value.
2. if an index depends on it with no activation in between. An index that activations choose (the best token, the
   best experts) reads one of equally many rows, so the weights behind it remain weights.
3. if it is an integer, a boolean or a string, unless it is the operand of a quantized product.
4. if it is a floating-point scalar, unless it belongs to a quantization. No layer has such a weight; base and
   merged graph have it from the same exporter and the same configuration.
5. if it is small and goes into an operator that neither ONNX nor ONNX Runtime defines.

Shape and Size do not depend on the values of their input, so the search ends there.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from lora_export.onnx_export.graphs.operator_roles import (
    PRODUCTS,
    SHAPES,
    is_foreign,
    is_quantized,
    is_steering,
    keeps_type,
    role,
)

SMALL = 64  # elements of a constant of an unknown operator
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def subgraphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    """The graphs in an attribute of a node."""
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def steering_constants(model: ir.Model) -> frozenset[ir.Value]:
    """The initializers of the graph and its subgraphs that count by value."""
    flow = _Flow(model.graph.opset_imports)
    flow.add(model.graph)
    steered = flow.behind(flow.work) | flow.behind(flow.choices, end=flow.activations())
    return frozenset(v for v, t in flow.constants.items() if v in steered or flow.is_setting(v, t))


class _Flow:
    """constants: initializers; work, choices: values that steer; _sources: value → what it is computed from;
    _scales: scales that DynamicQuantizeLinear finds at run time."""

    def __init__(self, versions: Mapping[str, int]) -> None:
        self.work: set[ir.Value] = set()
        self.choices: set[ir.Value] = set()
        self.constants: dict[ir.Value, ir.TensorProtocol] = {}
        self._versions = versions
        self._sources: dict[ir.Value, list[ir.Value]] = defaultdict(list)
        self._types: dict[ir.Value, ir.DataType] = {}
        self._products: list[ir.Value] = []
        self._scales: set[ir.Value] = set()
        self._uses: dict[ir.Value, list[ir.Node]] = defaultdict(list)

    # --- building ------------------------------------------------------------------------------------------

    def add(self, graph: ir.Graph) -> None:
        """Add a graph, and the graphs within it."""
        for value in graph.initializers.values():
            if value.const_value is not None:
                self.constants[value] = value.const_value
        for node in graph:
            self._add_node(node)

    def _add_node(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        for position, value in enumerate(node.inputs):
            if value is not None:
                self._uses[value].append(node)
                what = role(node, position, self._type(value), self._versions)
                if what != "operand":
                    (self.work if what == "work" else self.choices).add(value)
        graphs = [graph for attribute in node.attributes.values() for graph in subgraphs(attribute)]
        for graph in graphs:
            self.add(graph)
            self._connect(node, graph.inputs, graph.outputs)
        if not graphs and node.op_type not in SHAPES:
            for value in node.outputs:
                self._sources[value] += inputs
        if node.op_type in PRODUCTS:
            self._products += node.outputs
        if node.op_type == "DynamicQuantizeLinear":
            self._scales.update(node.outputs[1:2])
        if node.op_type == "Cast":  # ONNX Runtime inserts some without a type in the graph
            self._types[node.outputs[0]] = ir.DataType(node.attributes.get_int("to", 0))
        elif inputs and keeps_type(node, self._versions) and (kept := self._type(node.inputs[0])):
            for value in node.outputs:
                self._types.setdefault(value, self._type(value) or kept)

    def _type(self, value: ir.Value | None) -> ir.DataType | None:
        return None if value is None else self._types.get(value, value.dtype) or None

    def _connect(self, node: ir.Node, starts: Sequence[ir.Value], ends: Sequence[ir.Value]) -> None:
        """How values enter and leave a subgraph. starts, ends: the subgraph's inputs and outputs."""
        inputs, outputs = node.inputs, node.outputs
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
            scanned = node.attributes.get_int("num_scan_inputs", 0)
            self._pair(starts[: len(starts) - scanned], ends)
            self._pair(outputs, ends)
        else:
            self.work.update(ends)
            for value in (*starts, *outputs):
                self._sources[value] += [v for v in (*inputs, *ends) if v is not None]

    def _pair(self, values: Iterable[ir.Value], sources: Iterable[ir.Value | None]) -> None:
        for value, source in zip(values, sources, strict=False):
            self._sources[value] += [] if source is None else [source]

    # --- asking --------------------------------------------------------------------------------------------

    def behind(self, values: Iterable[ir.Value], end: frozenset[ir.Value] = frozenset()) -> frozenset[ir.Value]:
        """These values and everything they are computed from, except what is behind the values in `end`."""
        return _reached(values, self._sources, end)

    def activations(self) -> frozenset[ir.Value]:
        """The outputs of matrix products, and everything computed from them."""
        onwards: dict[ir.Value, list[ir.Value]] = defaultdict(list)
        for value, sources in self._sources.items():
            for source in sources:
                onwards[source].append(value)
        return _reached(self._products, onwards, frozenset())

    def is_setting(self, value: ir.Value, tensor: ir.TensorProtocol) -> bool:
        """Whether a constant belongs to the architecture and is not a weight, by its type and its users."""
        uses = self._uses.get(value, [])
        if is_steering(tensor.dtype):
            return not (uses and all(is_quantized(node) for node in uses))
        if any(is_foreign(node) for node in uses):
            return bool(math.prod(tensor.shape.numpy()) <= SMALL)
        return len(tensor.shape) == 0 and tensor.dtype in _FLOATS and not any(map(self._scales_by, uses))

    def _scales_by(self, node: ir.Node) -> bool:
        return is_quantized(node) or (node.op_type == "Mul" and any(v in self._scales for v in node.inputs))


def _reached(
    values: Iterable[ir.Value], steps: Mapping[ir.Value, Sequence[ir.Value]], end: frozenset[ir.Value]
) -> frozenset[ir.Value]:
    reached: set[ir.Value] = set()
    waiting = [v for v in values if v not in end]
    while waiting:
        value = waiting.pop()
        if value not in reached:
            reached.add(value)
            waiting += (v for v in steps.get(value, ()) if v not in end)
    return frozenset(reached)
