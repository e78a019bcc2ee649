"""Graphs with int8 activations: what is quantized, and how far the outputs are from fp32."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from lora_export.contracts import ExportResult
from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import check_model
from lora_export.onnx_export.quantize.int8 import quantize_int8
from tests.onnx_export.conftest import VOCABULARY, feeds_of

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def graph(exported: Callable[..., ExportResult], bert: Path) -> Path:
    return exported(bert).model


def _feeds(graph: Path, count: int, seed: int) -> Sequence[Mapping[str, Array]]:
    random = np.random.default_rng(seed)
    return feeds_of(graph, [random.integers(4, VOCABULARY, size=9 + i).tolist() for i in range(count)])


def _outputs(graph: Path, feeds: Sequence[Mapping[str, Array]]) -> list[Array]:
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(None, dict(feed))[0]) for feed in feeds]


def _error(graph: Path, other: Path) -> float:
    feeds = _feeds(graph, 3, seed=1)
    pairs = zip(_outputs(graph, feeds), _outputs(other, feeds), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)


def _kinds(graph: Path) -> list[str]:
    return [n.op_type for n in onnx.load(str(graph), load_external_data=False).graph.node]


def test_int8_dynamic_ranges_agree(graph: Path, tmp_path: Path) -> None:
    beside = sorted(p.name for p in graph.parent.iterdir())
    touched = quantize_int8(graph, tmp_path / "model.onnx")
    assert sorted(p.name for p in graph.parent.iterdir()) == beside
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    check_model(tmp_path / "model.onnx")
    kinds = _kinds(tmp_path / "model.onnx")
    assert kinds.count("MatMulInteger") == _kinds(graph).count("MatMul")
    assert kinds.count("QAttention") == 2
    assert len(touched) == kinds.count("MatMulInteger") + 2
    assert 0 < _error(graph, tmp_path / "model.onnx") < 0.1  # large random weights make attention sharp


def test_int8_static_ranges_agree(graph: Path, tmp_path: Path) -> None:
    touched = quantize_int8(graph, tmp_path / "model.onnx", _feeds(graph, 8, seed=0))
    check_model(tmp_path / "model.onnx")
    kinds = _kinds(tmp_path / "model.onnx")
    assert len(touched) == kinds.count("MatMul") > 0
    assert "DynamicQuantizeLinear" not in kinds
    assert 0 < _error(graph, tmp_path / "model.onnx") < 0.1
    nodes = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph.node
    rounded = {name for n in nodes if n.op_type == "QuantizeLinear" for name in n.input}
    assert not rounded & {name for n in nodes if n.op_type == "MatMul" for name in n.output}


def test_int8_static_products_run_on_integers(graph: Path, tmp_path: Path) -> None:
    quantize_int8(graph, tmp_path / "model.onnx", _feeds(graph, 4, seed=0))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = _kinds(tmp_path / "optimized.onnx")
    assert kinds.count("MatMulIntegerToFloat") == _kinds(graph).count("MatMul") and "MatMul" not in kinds


def test_int8_ranges_match_inputs(graph: Path, tmp_path: Path) -> None:
    """Calibrated with one token over and over, the ranges are too narrow for others."""
    (tmp_path / "narrow").mkdir()
    quantize_int8(graph, tmp_path / "model.onnx", _feeds(graph, 8, seed=0))
    quantize_int8(graph, tmp_path / "narrow" / "model.onnx", feeds_of(graph, [[5, 5, 5]]))
    assert _error(graph, tmp_path / "narrow" / "model.onnx") > 1.5 * _error(graph, tmp_path / "model.onnx")


@pytest.mark.parametrize("calibrated", [False, True])
def test_int8_excluded_nodes_stay(graph: Path, tmp_path: Path, calibrated: bool) -> None:
    nodes = [n for n in onnx.load(str(graph), load_external_data=False).graph.node if n.op_type == "MatMul"]
    kept, feeds = nodes[0], _feeds(graph, 2, seed=0) if calibrated else None
    touched = quantize_int8(graph, tmp_path / "model.onnx", feeds, [kept.name])
    left = {n.name: n for n in onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph.node}
    assert kept.name not in touched
    assert list(left[kept.name].input) == list(kept.input)


def test_int8_without_products_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no product"):
        quantize_int8(graph, tmp_path / "model.onnx", None, ["*"])


def test_int8_calibration_without_inputs_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no input to calibrate"):
        quantize_int8(graph, tmp_path / "model.onnx", [])
    assert not list(tmp_path.iterdir())


def test_int8_half_precision_graph_is_refused(tmp_path: Path) -> None:
    half = onnx.TensorProto.FLOAT16
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            "g",
            [onnx.helper.make_tensor_value_info("x", half, ["n", 4])],
            [onnx.helper.make_tensor_value_info("y", half, ["n", 4])],
            [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float16), "w")],
        )
    )
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(ExportError, match="fp32"):
        quantize_int8(tmp_path / "half.onnx", tmp_path / "model.onnx")
