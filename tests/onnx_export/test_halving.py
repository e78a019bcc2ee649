"""A graph in half precision: what ONNX Runtime computes with it, and which types it has where."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_export.onnx_export.engines.dynamo_passes.halving import halve
from lora_export.onnx_export.engines.dynamo_passes.kept_wide import kept_by

DRAW = np.random.default_rng(3)
WEIGHT = DRAW.standard_normal((4, 3)).astype(np.float32)
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def graph() -> onnx.ModelProto:
    """x·W + cast(ids) + a constant; the sum is an output, and so is what is below a mask of −3.4e38."""
    mask = helper.make_node(
        "Constant", [], ["mask"], value=numpy_helper.from_array(np.float32([np.finfo(np.float32).min, 0, 0.5]))
    )
    nodes = [
        mask,
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["product", "numbers"], ["sum"]),
        helper.make_node("Add", ["sum", "mask"], ["masked"]),
        helper.make_node("Identity", ["ids"], ["same_ids"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, [3]),
    ]
    outputs = [
        helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", 3]),
        helper.make_tensor_value_info("masked", TensorProto.FLOAT, ["batch", 3]),
        helper.make_tensor_value_info("same_ids", TensorProto.INT64, [3]),
    ]
    made = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(WEIGHT, "w")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def halved(dtype: str) -> onnx.ModelProto:
    model = ir.from_proto(graph())
    halve(model, ir.DataType[dtype])
    return ir.to_proto(model)


def test_halving_keeps_fp32_inputs_and_outputs() -> None:
    feeds = {"x": DRAW.standard_normal((2, 4)).astype(np.float32), "ids": np.array([1, -2, 7], np.int64)}

    def run(model: onnx.ModelProto) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, feeds)

    whole, half = run(graph()), run(halved("FLOAT16"))
    assert [v.dtype for v in half] == [np.float32, np.float32, np.int64]
    np.testing.assert_allclose(half[0], whole[0], atol=0.01)
    assert not np.array_equal(half[0], whole[0])  # it was rounded
    assert (half[1][:, 0] < -6e4).all() and np.isfinite(half[1]).all()  # the mask is the least half, not −infinity
    np.testing.assert_allclose(half[1][:, 1:], whole[1][:, 1:], atol=0.01)
    np.testing.assert_array_equal(half[2], whole[2])


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_halving_converts_every_inner_type(dtype: str) -> None:
    model = halved(dtype)
    onnx.checker.check_model(model, full_check=True)
    kind = TensorProto.DataType.Value(dtype)
    assert [t.data_type for t in model.graph.initializer] == [kind]
    inside = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert {t for n, t in inside.items() if t in FLOATS} == {kind}
    (mask,) = (n.attribute[0].t for n in model.graph.node if n.op_type == "Constant")
    assert mask.data_type == kind and np.isfinite(numpy_helper.to_array(mask).astype(np.float32)).all()
    ends = [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
    assert ends == [TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64]


def test_halving_weight_without_numbers_changes_type(tmp_path: Path) -> None:
    """Weights of a model stay in its files until the writer rounds them."""
    model = ir.from_proto(graph())
    weight = model.graph.initializers["w"]
    weight.const_value = ir.ExternalTensor(
        str(tmp_path / "nowhere"), 0, 48, ir.DataType.FLOAT, shape=ir.Shape([4, 3]), name="w"
    )
    halve(model, ir.DataType.FLOAT16)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (tensor.dtype, tuple(tensor.shape)) == (ir.DataType.FLOAT16, (4, 3))
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16


def test_halving_of_rotary_angles_keeps_them_in_fp32() -> None:
    """cos of position · frequency: at 3,001, fp16 has steps of 2."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "frequency"], ["angle"]),
        helper.make_node("Cos", ["angle"], ["turned"]),
        helper.make_node("Mul", ["turned", "frequency"], ["scaled"]),
    ]
    given = [helper.make_tensor_value_info("ids", TensorProto.INT64, [2])]
    given_back = [helper.make_tensor_value_info("scaled", TensorProto.FLOAT, [2])]
    frequency = numpy_helper.from_array(np.float32([0.73]), "frequency")
    made = helper.make_graph(nodes, "g", given, given_back, [frequency])
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )
    narrow = ir.from_proto(model)
    halve(narrow, ir.DataType.FLOAT16)
    session = onnxruntime.InferenceSession(
        ir.to_proto(narrow).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"ids": np.array([3001, 7], np.int64)})
    assert np.abs(found - np.cos(np.array([3001, 7]) * 0.73) * 0.73).max() < 2e-3


# --- what stays in fp32 --------------------------------------------------------------------------------------


def layer() -> onnx.ModelProto:
    """A block of T5: x + relu(x·wi)·wo beyond 65,504, normalized, and a product of the result."""
    shape = (4, 4)
    weights = {
        "wi.weight": DRAW.standard_normal(shape) * 30,
        "block.wo.weight_transposed": DRAW.standard_normal(shape) * 9e4,
        "norm.weight": DRAW.uniform(0.5, 1.5, 4),
        "q.weight": DRAW.standard_normal(shape),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "wi.weight"], ["wide_in"]),
        helper.make_node("Relu", ["wide_in"], ["inside"]),
        helper.make_node("MatMul", ["inside", "block.wo.weight_transposed"], ["forwarded"]),
        helper.make_node("Add", ["x", "forwarded"], ["residual"]),
        helper.make_node("LayerNormalization", ["residual", "norm.weight"], ["normal"]),
        helper.make_node("MatMul", ["normal", "q.weight"], ["q"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "q", "residual")]
    stored = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


class Keeps:
    _keep_in_fp32_modules = ("wo",)


@pytest.mark.parametrize(("dtype", "finite"), [("FLOAT16", True), ("BFLOAT16", False)])
def test_halving_kept_module_computes_in_fp32(dtype: str, finite: bool) -> None:
    kind = ir.DataType[dtype]
    plain = layer()
    kept, narrow = (ir.from_proto(plain) for _ in range(2))
    halve(kept, kind, kept_by(Keeps, kind))
    halve(narrow, kind)
    types = {t.name: t.data_type for t in ir.to_proto(kept).graph.initializer}
    half = TensorProto.DataType.Value(dtype)
    assert types["wi.weight"] == types["q.weight"] == half
    assert (types["block.wo.weight_transposed"] == TensorProto.FLOAT) is finite
    onnx.checker.check_model(ir.to_proto(kept), full_check=True)
    if not finite:  # the list is float16's: bfloat16 has the range of fp32
        assert ir.to_proto(kept).SerializeToString() == ir.to_proto(narrow).SerializeToString()
        return
    feeds = {"x": DRAW.standard_normal((3, 4)).astype(np.float32)}

    def run(model: onnx.ModelProto) -> np.ndarray:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(["q"], feeds)[0]

    whole = run(plain)
    np.testing.assert_allclose(run(ir.to_proto(kept)), whole, atol=0.02)
    assert not np.allclose(run(ir.to_proto(narrow)), whole, atol=0.02)
