"""Constants that decide how much a graph does count by value; weights count by type and shape.

Each graph is written twice with another number in its constant `c`, a float vector: integers and numbers without
dimensions count by value wherever they go.
"""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.canonical import canonical
from lora_export.onnx_export.graphs.checks import as_ir
from lora_export.onnx_export.graphs.identity import compare
from lora_export.onnx_export.graphs.operator_roles import role

LENGTH = "long = Shape(x)  length = Cast<to = 1>(long)"
# What of the float vector `n`, made of c, each graph steers by. x is float[length, 4].
STEERED = {
    "If": "t = Greater(length, n)  b = Squeeze(t)  y = If(b) <then_branch = a () => (float[m] p) {p = Exp(x)},"
    " else_branch = a () => (float[m] p) {p = Identity(x)}>",
    "Loop": "i = Cast<to = 7>(n)  j = Squeeze(i)  y = Loop(j, , x) <body = a (int64 s, bool v, float[m] p)"
    " => (bool w, float[m] q) {w = Identity(v)  q = Exp(p)}>",
    "Loop condition": "i = Size(x)  t = Less(length, n)  b = Squeeze(t)  y = Loop(i, b, x)"
    " <body = a (int64 s, bool v, float[m] p) => (bool w, float[m] q) {w = Identity(v)  q = Exp(p)}>",
    "Loop condition inside": "i = Size(x)  y = Loop(i, , x) <body = a (int64 s, bool v, float[m] p)"
    " => (bool w, float[m] q) {e = Cast<to = 1>(s)  w = Less(e, n)  q = Exp(p)}>",
    "into a loop": "i = Size(x)  j = Cast<to = 7>(n)  y, z = Loop(i, , x, j) <body = a (int64 s, bool v,"
    " float[m] p,"
    " int64[m] r) => (bool w, float[m] q, int64[m] t) {w = Identity(v)  q = Tile(p, r)  t = Shape(p)}>",
    "within a loop": "i = Size(x)  y, z = Loop(i, , x, long) <body = a (int64 s, bool v, float[m] p, int64[m] r)"
    " => (bool w, float[m] q, int64[m] t) {w = Identity(v)  q = Tile(p, r)  t = Cast<to = 7>(n)}>",
    "out of a loop": "i = Size(x)  z = Loop(i, , long) <body = a (int64 s, bool v, int64[m] p) => (bool w,"
    " int64[m] q)"
    " {w = Identity(v)  q = Cast<to = 7>(n)}>  y = Reshape(x, z)",
    "through no loop": "i = Size(x)  j = Cast<to = 7>(n)  z = Loop(i, , j) <body = a (int64 s, bool v, int64[m] p)"
    " => (bool w, int64[m] q) {w = Identity(v)  q = Shape(x)}>  y = Reshape(x, z)",
    "out of a branch": "e = ReduceMax<keepdims = 0>(x)  t = Greater(e, e)  z = If(t) <then_branch = a () =>"
    " (int64[m] p)"
    " {p = Cast<to = 7>(n)}, else_branch = a () => (int64[m] q) {q = Shape(x)}>  y = Reshape(x, z)",
    "into a scan": "z, y = Scan<num_scan_inputs = 1, body = a (float[m] s, float[m] p) => (float[m] t, float[m] r)"
    " {i = Cast<to = 7>(s)  t = ReduceMax(p)  r = Tile(p, i)}>(n, x)",
    "within a scan": "z, y = Scan<num_scan_inputs = 1, body = a (float[m] s, float[m] p) => (float[m] t, float[m]"
    " r) {i = Cast<to = 7>(s)  t = Neg(n)  r = Tile(p, i)}>(length, x)",
    "out of a scan": "z, u = Scan<num_scan_inputs = 1, body = a (float[m] s, float[m] p) => (float[m] t, float[m]"
    " r) {t = Neg(n)  r = Exp(p)}>(length, x)  i = Cast<to = 7>(z)  y = Reshape(x, i)",
    "Unique": "y = Unique(n)",
    "Upsample": "s = Concat<axis = 0>(n, n)  y = Upsample(x, s)",
    "DynamicTimeWarping": "y = com.microsoft.DynamicTimeWarping(n)",
    "Reshape": "f = Neg(n)  i = Cast<to = 7>(f)  y = Reshape(x, i)",
    "Expand": "i = Cast<to = 7>(n)  s = Unsqueeze(x, i)  y = Identity(s)",
    "Tile": "i = Cast<to = 7>(n)  j = Concat<axis = 0>(i, i)  y = Tile(x, j)",
    "Slice": "i = Cast<to = 7>(n)  j = Sub(i, i)  y = Slice(x, j, i)",
    "Pad": "i = Cast<to = 7>(n)  j = Concat<axis = 0>(i, i, i, i)  y = Pad(x, j)",
    "Range": "i = Squeeze(n)  z = Sub(i, i)  d = Exp(z)  y = Range(z, i, d)",
    "ConstantOfShape": "i = Cast<to = 7>(n)  y = ConstantOfShape(i)",
    "TopK": "i = Cast<to = 7>(n)  y, z = TopK(x, i)",
    "OneHot": "i = Cast<to = 7>(length)  v = Concat<axis = 0>(length, length)  y = OneHot(i, n, v)",
    "Resize": "s = Concat<axis = 0>(n, n)  y = Resize(x, , s)",
    "Split": "i = Cast<to = 7>(n)  j = Concat<axis = 0>(i, i)  y, z = Split(x, j)",
    "Trilu": "i = Cast<to = 7>(n)  j = Squeeze(i)  y = Trilu(x, j)",
    "NonZero": "t = Sub(x, n)  y = NonZero(t)",
    "Compress": "t = Less(x, n)  f = Flatten<axis = 0>(t)  b = Squeeze(f)  y = Compress(x, b)",
    "Gather": "i = Cast<to = 7>(n)  y = Gather(x, i)",
    "GatherND": "i = Cast<to = 7>(n)  y = GatherND(x, i)",
    "ScatterND": "i = Cast<to = 7>(n)  j = Unsqueeze(i, i)  y = ScatterND(x, j, x)",
    "Pow": "y = Pow(x, n)",
    "NonMaxSuppression": "b = Unsqueeze(x, long)  i = Size(x)  y = NonMaxSuppression(b, b, i, n)",
    "SequenceAt": "q = SplitToSequence(x)  i = Cast<to = 7>(n)  j = Squeeze(i)  y = SequenceAt(q, j)",
    "com.microsoft": "i = Cast<to = 6>(n)  y = com.microsoft.MultiHeadAttention<num_heads = 1>(x, x, x, , i)",
    "unknown integer": "i = Cast<to = 7>(n)  y = somewhere.New(x, i)",
    "unknown": "y = somewhere.New(x, c)",
    "of a branch": "u = Identity(n)  e = ReduceMax<keepdims = 0>(x)  t = Greater(e, e)  y = If(t) <then_branch = a"
    " () => (float[m] p) {i = Cast<to = 7>(u)  p = Tile(x, i)}, else_branch = a () => (float[m] p) {p = Exp(x)}>",
    "after a product": "z = MatMul(x, n)  r = ReduceMax<keepdims = 0>(z)  t = Greater(r, length)  b = Squeeze(t)"
    " y = If(b) <then_branch = a () => (float[m] p) {p = Exp(x)}, else_branch = a () => (float[m] q) {q = Neg(x)}"
    ">",
}  # fmt: skip
OPERANDS = {
    "MatMul": "y = MatMul(x, c)",
    "bias": "z = MatMul(x, x)  y = Add(z, c)",
    "norm": "y = LayerNormalization(x, c)",
    "mask": "t = Greater(x, c)  y = Where(t, x, c)",
    "shape of it": "z = Add(x, c)  i = Shape(z)  y = Reshape(x, i)",
    "best token": "z = MatMul(x, c)  s = Add(z, c)  i = ArgMax(s)  y = Gather(x, i)",
    "experts": "z = MatMul(x, c)  y = com.microsoft.MoE(x, z, c, , c)",
    "in a loop": "i = Size(x)  y = Loop(i, , x) <body = a (int64 s, bool v, float[m] p)"
    " => (bool w, float[m] q) {w = Identity(v)  q = Mul(p, c)}>",
    "in a scan": "z = Add(x, c)  q, y = Scan<num_scan_inputs = 1, body = a (float[m] s, float[m] p)"
    " => (float[m] t, float[m] r) {t = Add(s, p)  r = Mul(p, c)}>(z, x)",
}  # fmt: skip


def model(text: str, number: float, width: int = 1) -> onnx.ModelProto:
    made = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1, "somewhere": 1]>'
        f"g (float[length, 4] x) => (float[m, k] y) {{ {text} }}"
    )
    made.graph.initializer.append(numpy_helper.from_array(np.full(width, number, np.float32), "c"))
    return made


def sha256(text: str, number: float, width: int = 1) -> str:
    return canonical(as_ir(model(text, number, width)), {}).sha256


@pytest.mark.parametrize("name", STEERED)
def test_steering_constant_counts_by_value(name: str) -> None:
    text = f"{LENGTH}  n = Mul(c, c)  {STEERED[name]}"
    assert sha256(text, 3) == sha256(text, 3)
    assert sha256(text, 3) != sha256(text, 300)


@pytest.mark.parametrize("name", OPERANDS)
def test_steering_weight_counts_by_type_and_shape(name: str) -> None:
    assert sha256(OPERANDS[name], 3) == sha256(OPERANDS[name], 300)
    assert sha256(OPERANDS[name], 3) != sha256(OPERANDS[name], 3, width=2)


def branch(threshold: float, folder: Path) -> Path:
    """A graph that multiplies fifty times more often if there are more than `threshold` rows."""
    weight = np.eye(4, dtype=np.float32)
    chain = [helper.make_node("MatMul", [f"a{i}", "w"], [f"a{i + 1}"]) for i in range(50)]
    out = [helper.make_tensor_value_info("end", TensorProto.FLOAT, ["n", 4])]
    short = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["end"])], "short", [], out)
    first, last = helper.make_node("Identity", ["x"], ["a0"]), helper.make_node("Identity", ["a50"], ["end"])
    long = helper.make_graph([first, *chain, last], "long", [], out)
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], end=1),
        helper.make_node("Cast", ["shape"], ["length"], to=TensorProto.FLOAT),
        helper.make_node("Greater", ["length", "threshold"], ["longer"]),
        helper.make_node("If", ["longer"], ["y"], then_branch=long, else_branch=short),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in "xy"]
    held = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.array([threshold], np.float32), "threshold"),
    ]
    made = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], held), opset_imports=[helper.make_opsetid("", 18)]
    )
    made.ir_version = 10
    path = folder / f"{threshold}.onnx"
    onnx.save(made, str(path))
    return path


def test_steering_branch_on_length_is_other_graph(tmp_path: Path) -> None:
    base = branch(1e6, tmp_path)
    assert compare([base], [base], "cpu").identical
    found = compare([base], [branch(300.0, tmp_path)], "cpu")
    assert not found.identical
    (difference,) = found.differences
    assert "Greater" in difference and "1000000.0" in difference and "300.0" in difference


def test_steering_large_table_is_read_from_file(tmp_path: Path) -> None:
    def saved(last: float) -> Path:
        made = model("u = Shape(x)  n = Gather(c, u)  i = Cast<to = 7>(n)  y = Reshape(x, i)", 0)
        table = np.full((5000,), 2, np.float32)
        table[-1] = last
        made.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "c"))
        path = tmp_path / f"{last}.onnx"
        onnx.save(made, str(path))
        return path

    assert compare([saved(2)], [saved(2)], "cpu").identical
    assert not compare([saved(2)], [saved(3)], "cpu").identical
    stored = onnx.load(str(saved(2)))
    onnx.external_data_helper.convert_model_to_external_data(stored, location="d", size_threshold=0)
    onnx.external_data_helper.write_external_data_tensors(stored, str(tmp_path))
    beside = [canonical(as_ir(stored, tmp_path / "model.onnx"), {}).sha256 for _ in range(2)]
    assert beside[0] == beside[1]
    with pytest.raises(ExportError, match="stored in another file"):
        canonical(as_ir(stored), {})


def constant(value: np.ndarray, text: str) -> str:
    made = model(text, 0)
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(value, "c"))
    return canonical(as_ir(made), {}).sha256


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_, np.float32, np.float16])
def test_steering_settings_count_by_value(dtype: type) -> None:
    """Integers and booleans of any size, and floats without dimensions, are of the architecture."""
    shape = () if np.issubdtype(dtype, np.floating) else (100,)
    assert constant(np.zeros(shape, dtype), "y = Add(x, c)") != constant(np.ones(shape, dtype), "y = Add(x, c)")


def test_steering_quantization_parameters_are_weights() -> None:
    for value, text in (
        (np.float32(2), "q, s, z = DynamicQuantizeLinear(x)  t = Mul(s, c)  y = Mul(x, t)"),
        (np.float32(2), "q = QuantizeLinear(x, c)  y = DequantizeLinear(q, c)"),
        (np.uint8(2), "s = ReduceMax(x)  y = QuantizeLinear(x, s, c)"),
        (np.full(9, 2, np.int32), "s = ReduceMax(x)  y = DequantizeLinear(c, s)"),
        (np.full((8, 1, 4), 2, np.uint8), "y = com.microsoft.MatMulNBits<K = 4, N = 8>(x, c, x)"),
    ):
        other = np.asarray(value + value)
        assert constant(np.asarray(value), text) == constant(other.astype(value.dtype), text), text


def test_steering_attributes_and_overridden_inputs_count() -> None:
    def filled(value: float) -> str:
        text = f"i = Shape(x)  y = ConstantOfShape<value = float[1] {{{value}}}>(i)"
        return canonical(as_ir(model(text, 0)), {}).sha256

    assert filled(1) != filled(2)
    made = [model("i = Cast<to = 7>(c)  y = Reshape(x, i)", number) for number in (2, 4)]
    for one in made:
        one.graph.input.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [1]))
    assert len({canonical(as_ir(one), {}).sha256 for one in made}) == 2


def test_steering_loop_inputs_have_positions() -> None:
    body = "<body = a (int64 s, bool v, float[m] p, float[m] q) => (bool w, float[m] t, float[m] u)"
    text = f"i = Size(x)  y, z = Loop(i, , x, x) {body} {{w = Identity(v)  t = Exp(%s)  u = Neg(%s)}}>"
    assert sha256(text % ("p", "q"), 1) != sha256(text % ("q", "p"), 1)


def test_steering_operator_follows_its_version() -> None:
    made = [model("y = Softmax(x)", 1) for _ in range(3)]
    for one, version in zip(made, (12, 13, 18), strict=True):
        one.opset_import[0].version = version
    old, new, newer = (canonical(as_ir(one), {}).sha256 for one in made)
    assert old != new == newer


def test_steering_roles_of_contrib_operators_are_complete() -> None:
    """By the types in a graph alone, every input that takes 32- or 64-bit integers and no floats steers."""
    registry = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    if not hasattr(registry, "get_all_operator_schema"):
        pytest.skip("this build of ONNX Runtime does not tell its schemas")
    operands = {("DequantizeLinear", 0), ("DequantizeLinear", 2), ("QGemm", 6), ("QLinearConv", 8)}
    operands |= {("QLinearWhere", 0)}
    seen = 0
    for schema in registry.get_all_operator_schema():
        kinds = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        for i, parameter in enumerate(schema.inputs):
            allowed = kinds.get(parameter.typeStr, [parameter.typeStr])
            wide = [t for t in ("int32", "int64", "bool") if f"tensor({t})" in allowed]
            if schema.domain != "com.microsoft" or not wide or any("float" in t for t in allowed):
                continue
            node = ir.node(schema.name, [], domain=schema.domain)
            found = role(node, i, ir.DataType[wide[0].upper()], {})
            assert (found == "operand") == ((schema.name, i) in operands), f"{schema.name}, input {i}: {found}"
            seen += 1
    assert seen > 50
