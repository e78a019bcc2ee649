"""Types of weights that are refused by name, and that ONNX Runtime is still as the refusals say."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from lora_export.commands.main import cli

WIDTH = 64
BLOCKS = WIDTH // 16
SAID = {
    "fp8": ("converts them to fp32 at each run", "--precision int8"),
    "nvfp4": ("does not read them on the CPU", "--precision int4"),
    "mxfp4": ("in the experts of a mixture alone", "--precision int4"),
}


@pytest.mark.parametrize("precision", SAID)
@pytest.mark.parametrize("how", ["export", "planned", "pluggable", "run"])
def test_precision_without_kernel_is_refused(
    precision: str, how: str, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    out = ["-o", str(tmp_path / "out"), "--precision", precision]
    words = {
        "export": ["export", "-m", str(llama)],
        "planned": ["export", "-m", str(llama), "--dry-run"],
        "pluggable": ["export", "-m", str(llama), "-a", str(adapter)],
        "run": ["merge-and-export", "-b", str(llama), "-a", str(adapter)],
    }[how]
    found = CliRunner().invoke(cli, [*words, *out])
    reason, instead = SAID[precision]
    assert found.exit_code == 1
    assert f"{precision} weights (" in found.stderr and reason in found.stderr and instead in found.stderr
    assert not list(tmp_path.iterdir())


def _model(nodes: Sequence[onnx.NodeProto], weights: Sequence[onnx.TensorProto], dtype: int) -> bytes:
    """A graph of inputs and router (1, WIDTH), opset 25."""
    inputs = [helper.make_tensor_value_info(name, dtype, [1, WIDTH]) for name in ("x", "r")]
    output = helper.make_tensor_value_info("y", dtype, [1, WIDTH])
    graph = helper.make_graph(nodes, "g", inputs, [output], weights)
    opsets = [helper.make_opsetid("", 25), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())


def _raw(name: str, dtype: int, shape: Sequence[int], size: int) -> onnx.TensorProto:
    return helper.make_tensor(name, dtype, shape, bytes([0x22]) * size, raw=True)


E4M3, E2M1, E8M0 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E8M0
SQUARE = WIDTH * WIDTH
ONE = numpy_helper.from_array(np.float32(1), "one")
CONTRIB = {"domain": "com.microsoft"}
DEQUANTIZED = (
    helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=16),
    helper.make_node("MatMul", ["x", "d"], ["y"]),
)
SCALES = numpy_helper.from_array(np.ones((BLOCKS, WIDTH), np.float32), "s")
NONE_ON_CPU = {
    "fp8 product": _model(
        [helper.make_node("MatMulBlockQuantizedFp8Weight", ["x", "w", "s"], ["y"], block_size=WIDTH, **CONTRIB)],
        [_raw("w", E4M3, (WIDTH, WIDTH), SQUARE), numpy_helper.from_array(np.ones((WIDTH, 1), np.float32), "s")],
        TensorProto.FLOAT16,
    ),
    "nvfp4 product": _model(
        [helper.make_node("MatMulBlockQuantizedFp4Weight", ["x", "w", "s", "one"], ["y"], **CONTRIB)],
        [
            _raw("w", TensorProto.UINT8, (WIDTH, WIDTH // 2), SQUARE // 2),
            _raw("s", TensorProto.UINT8, (WIDTH, BLOCKS), WIDTH * BLOCKS),
            ONE,
        ],
        TensorProto.FLOAT16,
    ),
    "fp4 dequantized": _model(DEQUANTIZED, [_raw("w", E2M1, (WIDTH, WIDTH), SQUARE // 2), SCALES], 1),
    "mxfp4 experts": _model(
        [
            helper.make_node(
                "QMoE", ["x", "r", "w", "s", "", "w", "s", *[""] * 8, "g", "g"], ["y"],
                quant_type="fp4", expert_weight_bits=4, **CONTRIB,
            )
        ],
        [
            _raw("w", TensorProto.UINT8, (WIDTH, WIDTH, WIDTH // 2), WIDTH * SQUARE // 2),
            _raw("s", E8M0, (WIDTH, WIDTH, WIDTH // 32), WIDTH * WIDTH * (WIDTH // 32)),
            numpy_helper.from_array(np.ones(WIDTH, np.float32), "g"),
        ],
        TensorProto.FLOAT16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NONE_ON_CPU)
def test_refused_weights_have_no_cpu_kernel(what: str) -> None:
    """Where this fails, ONNX Runtime runs them, and the refusal has no reason any more."""
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|INVALID_GRAPH.*Type Error"):
        ort.InferenceSession(NONE_ON_CPU[what], providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("dtype", "left"), [(E4M3, "MatMul"), (TensorProto.INT8, "MatMulNBits")])
def test_fp8_weights_are_converted_at_each_run(dtype: int, left: str, tmp_path: Path) -> None:
    """Those of int8 are not: their conversion becomes part of the product."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = _model(DEQUANTIZED, [_raw("w", dtype, (WIDTH, WIDTH), SQUARE), SCALES], TensorProto.FLOAT)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {n: np.ones((1, WIDTH), np.float32) for n in ("x", "r")})[0]).all()
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds[left] == 1 and kinds["DequantizeLinear"] == (left == "MatMul")
