"""bfloat16 that a model computes with by itself, in a graph for a processor that has no such arithmetic."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from lora_export.onnx_export.engines.dynamo_passes.emulating import widen_bfloat16
from lora_export.onnx_export.engines.dynamo_passes.traced_graph import TracedGraph


def test_widened_product_is_rounded_as_pytorch_rounds_it() -> None:
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.randn(64, generator=draw) * 300 for _ in range(2))
    a, b = (ir.Value(name=n, shape=ir.Shape([64]), type=ir.TensorType(ir.DataType.FLOAT)) for n in "ab")
    bfloat16, fp32 = int(ir.DataType.BFLOAT16), int(ir.DataType.FLOAT)
    narrow = [ir.node("Cast", [v], {"to": bfloat16}) for v in (a, b)]
    product = ir.node("Mul", [n.outputs[0] for n in narrow])
    back = ir.node("Cast", [product.outputs[0]], {"to": fp32})
    for node in (*narrow, product):
        node.outputs[0].dtype = ir.DataType.BFLOAT16
    back.outputs[0].dtype, back.outputs[0].name = ir.DataType.FLOAT, "out"
    inner = ir.Graph([a, b], back.outputs, nodes=[*narrow, product, back], name="g", opset_imports={"": 20})
    graph = TracedGraph(ir.Model(inner, ir_version=10), {})
    widen_bfloat16(graph)
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"a": left.numpy(), "b": right.numpy()})
    expected = (left.bfloat16() * right.bfloat16()).float().numpy()
    assert np.array_equal(found, expected)
