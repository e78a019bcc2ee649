"""Shapes that a graph need not compute, and layouts that it need not change: Reshape and Transpose."""

from typing import Any

import onnx_ir as ir

from lora_export.onnx_export.engines.dynamo_passes.traced_graph import (
    MICROSOFT,
    TracedGraph,
    constant,
    permutation,
    producer,
    put,
    replace_uses,
)

_HEADS_FIRST = [0, 2, 1, 3]


def tidy_shapes(graph: TracedGraph) -> None:
    rotate_flat(graph)
    join_reshapes(graph)
    settle_reshapes(graph)


def rotate_flat(graph: TracedGraph) -> None:
    """Rotary embeddings of (batch, length, heads × size) in place of those between two Transposes."""
    for node in graph.nodes("RotaryEmbedding"):
        before = producer(node.inputs[0], "Transpose")
        users = [user for user, _ in node.outputs[0].uses()]
        turned_back = all(u.op_type == "Transpose" and permutation(u) == _HEADS_FIRST for u in users)
        if before is None or permutation(before) != _HEADS_FIRST or not users or not turned_back:
            continue
        split = before.inputs[0]
        if split is None or split.shape is None or node.outputs[0].is_graph_output():
            continue
        heads, size = split.shape[2], split.shape[3]
        if not isinstance(heads, int) or not isinstance(size, int):
            continue
        flat_shape = ir.Shape([split.shape[0], split.shape[1], heads * size])
        flat = ir.node("Reshape", [split, constant(graph, [0, 0, heads * size])], num_outputs=1)
        rotated = ir.node(
            "RotaryEmbedding", [flat.outputs[0], *node.inputs[1:]], {"num_heads": heads}, domain=MICROSOFT,
            num_outputs=1,
        )  # fmt: skip
        apart = ir.node("Reshape", [rotated.outputs[0], constant(graph, [0, 0, heads, size])], num_outputs=1)
        for each, shape in ((flat, flat_shape), (rotated, flat_shape), (apart, split.shape)):
            each.outputs[0].dtype, each.outputs[0].shape = split.dtype, shape
        assert node.graph is not None
        node.graph.insert_before(node, [flat, rotated, apart])
        for user in users:
            replace_uses(user.outputs[0], apart.outputs[0])


def join_reshapes(graph: TracedGraph) -> None:
    """Reshape of a Reshape: the second alone."""
    for node in graph.nodes("Reshape"):
        before = producer(node.inputs[0], "Reshape")
        while before is not None:
            node.replace_input_with(0, before.inputs[0])
            before = producer(node.inputs[0], "Reshape")


def settle_reshapes(graph: TracedGraph) -> None:
    """Shapes as constants: 0 where a size is the input's, and one −1. What computed them is then unused."""
    for node in graph.nodes("Reshape"):
        source, shape = node.inputs[0], node.outputs[0].shape
        if source is None or source.shape is None or shape is None:
            continue
        wanted = [_size(source.shape, i, dim) for i, dim in enumerate(shape)]
        if wanted.count(-1) > 1 or any(w is None for w in wanted):
            continue
        numbers = [int(w) for w in wanted if w is not None]
        put(node, ir.node("Reshape", [source, constant(graph, numbers)], num_outputs=1))


def _size(source: Any, axis: int, dim: Any) -> int | None:
    """A number, 0 for the size that the source has there, or −1; None for a size that may be zero."""
    if isinstance(dim, int):
        return dim if dim > 0 else None
    if dim.value is None or "past" in dim.value:
        return None
    if axis < len(source) and not isinstance(source[axis], int) and source[axis].value == dim.value:
        return 0
    return -1
