"""Which nodes of a half-precision graph stay in fp32: those that transformers itself computes so.

T5's `wo` products go beyond 65,504. transformers keeps such weights in fp32 (`_keep_in_fp32_modules`), and torch
then adds and normalizes their results in fp32, until the next product of half-precision weights.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

import onnx_ir as ir

# They take fp32 only for a weight that is kept; everything else stays in fp32 behind one that does.
_PRODUCTS = frozenset(
    {
        "MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "Conv", "ConvTranspose", "Einsum", "Attention",
        "MultiHeadAttention", "GroupQueryAttention", "MoE", "QMoE",
    }
)  # fmt: skip
_SAME_NUMBERS = frozenset({"Transpose", "Identity", "Reshape"})


def kept_by(model: Any, dtype: ir.DataType) -> Callable[[str], bool]:
    """Whether transformers keeps the parameter of a name in fp32 when the model is in half precision.

    Its strict list is for bfloat16, too; the other is for float16, whose numbers end at 65,504.
    """
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == ir.DataType.FLOAT16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not names:
        return lambda name: False
    alternatives = "|".join(re.escape(name) for name in sorted(names))
    return lambda name: re.search(rf"(^|\.)({alternatives})([._]|$)", name) is not None


def wide_nodes(graph: ir.Graph, kept: Callable[[str], bool]) -> frozenset[ir.Node]:
    """The nodes that compute in fp32, of a graph in the order of its calculation."""
    wide: set[ir.Node] = set()
    weights = {value for name, value in graph.initializers.items() if kept(name)}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
        kept_here = any(value in weights for value in inputs)
        if kept_here and node.op_type in _SAME_NUMBERS:
            weights.add(node.outputs[0])
        carried = node.op_type not in _PRODUCTS and any(value.producer() in wide for value in inputs)
        if kept_here or carried:
            wide.add(node)
    return frozenset(wide)


def only_wide(value: ir.Value, wide: Collection[ir.Node]) -> bool:
    """Whether all nodes that read a value compute in fp32."""
    uses = list(value.uses())
    return bool(uses) and all(user in wide for user, _ in uses)


def join(graph: ir.Graph, wide: Collection[ir.Node], dtype: ir.DataType) -> None:
    """Cast what the nodes of `wide` and those in half precision take from each other."""
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Cast":  # takes either
            continue
        wanted, other = (ir.DataType.FLOAT, dtype) if node in wide else (dtype, ir.DataType.FLOAT)
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != other or (node not in wide and not _of_wide(value, wide)):
                continue
            if (value, wanted) not in made:
                made[value, wanted] = _cast(graph, value, wanted)
            node.replace_input_with(index, made[value, wanted])


def _of_wide(value: ir.Value, wide: Collection[ir.Node]) -> bool:
    return value.is_initializer() or value.producer() in wide


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The value in another type, behind what makes it."""
    node = ir.node("Cast", [value], {"to": int(dtype)}, num_outputs=1)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = f"{value.name}_{dtype.name.lower()}", dtype, value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return output
