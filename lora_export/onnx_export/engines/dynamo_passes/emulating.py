"""Arithmetic in bfloat16 that a model has of its own, such as Falcon's ALiBi, for a processor without it."""

import onnx_ir as ir

from lora_export.onnx_export.engines.dynamo_passes.traced_graph import TracedGraph

_ARITHMETIC = ("Add", "Div", "Mul", "Neg", "Sub")


def widen_bfloat16(graph: TracedGraph) -> None:
    """Compute in fp32 and round the result, which is what PyTorch does."""
    narrow = ir.DataType.BFLOAT16
    for node in graph.nodes(*_ARITHMETIC):
        result = node.outputs[0]
        if result.dtype != narrow or node.graph is None:
            continue
        for index, value in enumerate(node.inputs):
            wide = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, num_outputs=1)
            wide.outputs[0].dtype, wide.outputs[0].shape = ir.DataType.FLOAT, value.shape if value else None
            node.graph.insert_before(node, wide)
            node.replace_input_with(index, wide.outputs[0])
        rounded = ir.node("Cast", [result], {"to": int(narrow)}, num_outputs=1)
        rounded.outputs[0].dtype, rounded.outputs[0].shape = narrow, result.shape
        uses = [(user, index) for user, index in result.uses() if user is not rounded]
        node.graph.insert_after(node, rounded)
        result.dtype = ir.DataType.FLOAT
        for user, index in uses:
            user.replace_input_with(index, rounded.outputs[0])
