"""Rotary embeddings as one operator of ONNX Runtime, for each query and key.

transformers multiplies by tables of cos and sin that it computes of the positions: x · cos + half-turned x · sin.
`com.microsoft::RotaryEmbedding` looks positions up in such tables. Here every token has a line of its own, so that
frequencies which follow the length, and rows that are padded on the left, stay what they are.
"""

from dataclasses import dataclass

import onnx_ir as ir

from lora_export.onnx_export.engines.dynamo_passes.traced_graph import (
    MICROSOFT,
    TracedGraph,
    constant,
    numbers_of,
    producer,
)


@dataclass(frozen=True)
class _Tables:
    """What the operator reads for a pair of cos and sin: tables (tokens, half size), and lines (batch, length)."""

    cos: ir.Value
    sin: ir.Value
    lines: ir.Value


def fuse_rotary(graph: TracedGraph) -> None:
    """Replace the products and sums of every embedding whose halves turn together (Llama's, not GPT-J's)."""
    tables: dict[tuple[ir.Value, ir.Value], _Tables] = {}
    for node in graph.nodes("Add"):
        found = _embedding(node)
        if found is None:
            continue
        states, cos, sin = found
        if (cos, sin) not in tables:
            made = _tables(graph, cos, sin)
            if made is None:
                continue
            tables[cos, sin] = made
        own = tables[cos, sin]
        new = ir.node("RotaryEmbedding", [states, own.lines, own.cos, own.sin], domain=MICROSOFT, num_outputs=1)
        new.name = node.name
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [new], node.outputs, new.outputs)
    graph.model.graph.sort()


def _embedding(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(states, cos, sin) of states · cos + turned(states) · sin, with tables (batch, 1, length, size)."""
    products = [producer(v, "Mul") for v in node.inputs]
    if len(products) != 2 or products[0] is None or products[1] is None:
        return None
    for straight, turned in (products, products[::-1]):
        assert straight is not None and turned is not None
        for states, sin in (turned.inputs, turned.inputs[::-1]):
            source = _half_turned(states)
            if source is None or source not in straight.inputs or sin is None:
                continue
            cos = straight.inputs[1 - straight.inputs.index(source)]
            if cos is None or source.shape is None or len(source.shape) != 4:
                return None
            return source, cos, sin
    return None


def _half_turned(value: ir.Value | None) -> ir.Value | None:
    """x, if the value is (−second half, first half) of it."""
    joined = producer(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"].as_int() not in (-1, 3):
        return None
    negative, first = producer(joined.inputs[0], "Neg"), producer(joined.inputs[1], "Slice")
    second = producer(negative.inputs[0], "Slice") if negative is not None else None
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    source = first.inputs[0]
    size = source.shape[-1] if source is not None and source.shape is not None else None
    if not isinstance(size, int) or size % 2:
        return None
    half = size // 2
    low, high = _bounds(first, size), _bounds(second, size)
    return source if low == (0, half) and high == (half, size) else None


def _bounds(node: ir.Node, size: int) -> tuple[int, int] | None:
    """First and last of a Slice along the last axis with step 1."""
    numbers = [numbers_of(v) for v in node.inputs[1:]]
    if len(numbers) < 3 or any(n is None or len(n) != 1 for n in numbers):
        return None
    start, stop, axis, *step = [n[0] for n in numbers if n is not None]
    return (start, min(stop, size)) if axis in (-1, 3) and step in ([], [1]) else None


def _tables(graph: TracedGraph, cos: ir.Value, sin: ir.Value) -> _Tables | None:
    """The operator's tables, if both halves of cos and sin are equal."""
    flat = [_without_heads(v) for v in (cos, sin)]
    if any(v is None or not _has_equal_halves(v) for v in flat):
        return None
    first, second = (v for v in flat if v is not None)
    assert first.shape is not None
    size = first.shape[-1]
    if not isinstance(size, int) or len(first.shape) != 3:
        return None
    half, zero, one, axis = constant(graph, [size // 2]), constant(graph, [0]), constant(graph, [1]), [-1]
    nodes: list[ir.Node] = []

    def add(kind: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes, num_outputs=1)
        nodes.append(node)
        return node.outputs[0]

    lines = []
    for table in (first, second):
        cut = add("Slice", [table, zero, half, constant(graph, axis), one])
        lines.append(add("Reshape", [cut, constant(graph, [-1, size // 2])]))
        for node in nodes[-2:]:
            node.outputs[0].dtype = table.dtype
    if first.shape[0] == 1:  # all rows have the positions of one: the operator counts from the first line
        places = zero
    else:
        shape = add("Shape", [first], start=0, end=2)
        count = add("ReduceProd", [shape], keepdims=0)
        numbers = add("Range", [constant(graph, 0), count, constant(graph, 1)])
        places = add("Reshape", [numbers, shape])
        for node in nodes[-4:]:
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    graph.model.graph.extend(nodes)
    return _Tables(lines[0], lines[1], places)


def _without_heads(value: ir.Value) -> ir.Value | None:
    """(batch, length, size) of a table (batch, 1, length, size)."""
    node = producer(value, "Unsqueeze")
    return node.inputs[0] if node is not None and numbers_of(node.inputs[1]) in ([1], [-3]) else None


def _has_equal_halves(value: ir.Value | None) -> bool:
    """Whether the value is computed, number by number, of a tensor that was joined to itself."""
    while value is not None:
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "Concat":
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        if node.op_type == "Mul":
            scalars = [
                v for v in node.inputs if v is not None and v.const_value is not None and v.const_value.size == 1
            ]
            others = [v for v in node.inputs if v not in scalars]
            value = others[0] if len(scalars) == 1 and len(others) == 1 else None
        elif node.op_type in ("Cos", "Sin", "Cast"):
            value = node.inputs[0]
        else:
            return False
    return False
