"""A table that one graph looks rows up in and another multiplies by: both read the same quantized parts."""

from typing import Any

import onnx_ir as ir
import pytest

from lora_export.onnx_export.quantize.blockwise import quantize_graph
from lora_export.onnx_export.quantize.settings import Blockwise
from lora_export.onnx_export.weights.map import Piece, Recipe, Weight

ROWS, WIDTH = 320, 64
TABLE = Weight("table", "data", "float32", (ROWS, WIDTH), Recipe((Piece("embedding", 0, ROWS),)))


def _graph(kind: str) -> ir.Model:
    ids = kind == "Gather"
    given = ir.Value(
        name="given", type=ir.TensorType(ir.DataType.INT64 if ids else ir.DataType.FLOAT),
        shape=ir.Shape(["b", "l"] if ids else ["b", "l", WIDTH]),
    )  # fmt: skip
    tensor = ir.ExternalTensor("", 0, 0, ir.DataType.FLOAT, shape=ir.Shape([ROWS, WIDTH]), name="table")
    table = ir.Value(
        name="table", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([ROWS, WIDTH])
    )
    how: dict[str, Any] = {"domain": "com.microsoft"} if not ids else {}
    attributes = {} if ids else {"transB": 1}
    inputs = [table, given] if ids else [given, table]
    node = ir.node(kind, inputs, attributes, num_outputs=1, name=f"{kind}_node", **how)
    node.outputs[0].name, node.outputs[0].type = "made", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["b", "l", WIDTH if ids else ROWS])
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=[table], opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_table_and_head_in_two_graphs_have_the_same_parts(method: Any) -> None:
    how = Blockwise(method=method, block_size=32)
    parts = [quantize_graph(_graph(kind), [TABLE], how, {"table"}) for kind in ("Gather", "FusedMatMul")]
    assert parts[0] == parts[1]
    assert {p.name for p in parts[0]} > {"table_scales"}


def test_table_alone_is_quantized_for_looking_up() -> None:
    how = Blockwise(method="int4", block_size=32)
    parts = quantize_graph(_graph("Gather"), [TABLE], how)
    assert "table_Q8" in {p.name for p in parts}
