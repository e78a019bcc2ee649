"""The numbers of a quantized weight against ONNX Runtime's own quantizers, byte for byte."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import (
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
)

from lora_export.onnx_export.quantize.numbers import dequantize, granularity, quantize, shapes
from lora_export.onnx_export.weights.map import Quantization

Array = np.ndarray[Any, Any]
SIZES = ((64, 32), (112, 7), (96, 5), (20, 3), (256, 33), (1000, 9))  # (in, out)
NBITS = [
    Quantization(method, "packed", block, symmetric, algorithm)
    for method in ("int4", "int8")
    for block in (16, 32, 128)
    for symmetric, algorithm in (
        (True, "default"), (False, "default"), (True, "rtn"), (False, "rtn"), (False, "k_quant"),
    )
]  # fmt: skip
BNB4 = [Quantization(method, "packed", block) for method in ("nf4", "fp4") for block in (16, 64, 128)]


def _name(how: Quantization) -> str:
    return f"{how.method}-{how.block_size}-{how.algorithm}-{'symmetric' if how.symmetric else 'asymmetric'}"


def _matrix(size: tuple[int, int], dtype: Any = np.float32) -> Array:
    """Columns of very different sizes, one outlier, one column and one block of zeros."""
    random = np.random.default_rng(size[0] * 1000 + size[1])
    matrix = random.normal(size=size) * np.exp(random.normal(size=(1, size[1])))
    matrix[3, 0] = 9.0
    matrix[:, 1] = 0
    matrix[:16, 2] = 0
    return np.asarray(matrix, dtype)


def _graph(matrix: Array) -> onnx.ModelProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(matrix.dtype)
    rows, columns = matrix.shape
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, ["n", rows])],
        [onnx.helper.make_tensor_value_info("y", kind, ["n", columns])],
        [onnx.numpy_helper.from_array(matrix, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def _by_onnxruntime(matrix: Array, how: Quantization) -> dict[str, Array]:
    """Initializers that ONNX Runtime's quantizer leaves in a graph with this one weight."""
    quantizer: Any
    if how.method in ("nf4", "fp4"):
        quantizer = MatMulBnb4Quantizer(_graph(matrix), int(how.method == "nf4"), how.block_size)
    else:
        bits = int(how.method[3:])
        own = {"product": {"bits": bits}}
        configs = {"rtn": RTNWeightOnlyQuantConfig, "k_quant": KQuantWeightOnlyQuantConfig}
        config = configs[how.algorithm](customized_weight_config=own) if how.algorithm in configs else None
        quantizer = MatMulNBitsQuantizer(
            _graph(matrix), bits=bits, block_size=how.block_size, is_symmetric=how.symmetric, algo_config=config
        )
    quantizer.process()
    found = quantizer.model.model.graph.initializer
    names = {"weight_scales": "scales", "scale": "scales", "absmax": "scales", "zp": "zero_points"}
    arrays = {t.name.removeprefix("w_"): onnx.numpy_helper.to_array(t) for t in found}
    return {names.get(n, "packed" if n[0] in "QB" else n): a for n, a in arrays.items()}


def _same(found: Mapping[Any, Array], expected: Mapping[str, Array]) -> None:
    assert set(found) == set(expected)
    for part, array in expected.items():
        assert found[part].dtype == array.dtype
        assert found[part].shape == array.shape
        assert found[part].tobytes() == array.tobytes()


def _onnxruntime_differs(how: Quantization, rows: int) -> bool:
    """Its rtn and k_quant cannot pack zero points of a column that has an odd number of blocks; and where a column
    is one block, k_quant adds in another order."""
    blocks = -(-rows // how.block_size)
    unpackable = how.algorithm != "default" and how.method == "int4" and not how.symmetric and blocks % 2 == 1
    return unpackable or (how.algorithm == "k_quant" and blocks == 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("how", NBITS + BNB4, ids=_name)
def test_quantizer_bytes_match_onnxruntime(how: Quantization, dtype: Any) -> None:
    for size in SIZES:
        if not _onnxruntime_differs(how, size[0]):
            matrix = _matrix(size, dtype)
            _same(quantize(matrix, how), _by_onnxruntime(matrix, how))


@pytest.mark.parametrize("how", NBITS + BNB4, ids=_name)
def test_quantizer_columns_may_be_split(how: Quantization) -> None:
    for size in SIZES:
        matrix = _matrix(size)
        step = granularity(size[0], how)
        whole = quantize(matrix, how)
        cut = [quantize(matrix[:, at : at + step], how) for at in range(0, size[1], step)]
        for part, array in whole.items():
            assert b"".join(c[part].tobytes() for c in cut) == array.tobytes(), (size, part)
            assert array.shape == shapes(*size, how)[part]


def _operator(how: Quantization, size: tuple[int, int], parts: Mapping[Any, Array]) -> Array:
    """What ONNX Runtime's operator multiplies with: its product with the identity."""
    rows, columns = size
    kind, attributes = "MatMulBnb4", {"K": rows, "N": columns, "block_size": how.block_size}
    if how.method in ("nf4", "fp4"):
        attributes["quant_type"] = int(how.method == "nf4")
    else:
        kind = "MatMulNBits"
        attributes |= {"bits": int(how.method[3:]), "accuracy_level": 1}
    node = onnx.helper.make_node(kind, ["x", *parts], ["y"], domain="com.microsoft", **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", rows])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", columns])],
        [onnx.numpy_helper.from_array(a, n) for n, a in parts.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": np.eye(rows, dtype=np.float32)})[0])


@pytest.mark.parametrize("how", NBITS + BNB4, ids=_name)
def test_quantized_operators_use_dequantized_matrix(how: Quantization) -> None:
    for size in ((64, 32), (112, 7), (1000, 9)):
        matrix = _matrix(size)
        parts = quantize(matrix, how)
        found = dequantize(parts, *size, how)
        np.testing.assert_allclose(_operator(how, size, parts), found, rtol=1e-5, atol=1e-6)
        error = np.linalg.norm(found - matrix) / np.linalg.norm(matrix)
        assert error < (0.02 if how.method == "int8" else 0.2)
