"""Graph identity: other weights are the same work, other operators, types or constants are not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import numpy_helper

from lora_export.contracts import ExportResult
from lora_export.onnx_export import compare
from lora_export.onnx_export.checks import load_graph
from lora_export.onnx_export.identity import fingerprint

from .conftest import save_llama

Exported = Callable[..., ExportResult]


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "other", seed=7)


def test_other_weights_are_the_same_graph(exported: Exported, llama: Path, other_weights: Path) -> None:
    a, b = exported(llama).model, exported(other_weights).model
    assert a.with_name("model.onnx.data").read_bytes() != b.with_name("model.onnx.data").read_bytes()
    assert compare(a, b, "cpu") == (True, ())
    assert fingerprint(a, "cpu") == fingerprint(b, "cpu")


def test_an_unmerged_adapter_is_seen(exported: Exported, llama: Path, adapter: Path) -> None:
    same, differences = compare(exported(llama).model, exported(llama, adapter=adapter).model, "cpu")
    assert not same
    # 2 layers × 3 projections, A and B each, and the packed projection of q, k, v taken apart
    assert "ai.onnx.MatMul: 11 in the base, 27 in the other" in differences


def test_another_type_is_seen(exported: Exported, llama: Path) -> None:
    same, differences = compare(exported(llama).model, exported(llama, "fp16").model, "cpu")
    assert not same
    assert any("float16" in line for line in differences)


def test_one_changed_attribute_is_seen(exported: Exported, llama: Path, tmp_path: Path) -> None:
    source = exported(llama).model
    model = load_graph(source)
    (node, *_) = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    (scale,) = [a for a in node.attribute if a.name == "scale"]
    scale.f *= 2
    changed = tmp_path / "model.onnx"
    changed.write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes(source.with_name("model.onnx.data").read_bytes())
    same, differences = compare(source, changed, "cpu")
    assert not same
    assert len(differences) == 1
    assert "GroupQueryAttention" in differences[0]


def test_values_of_integer_constants_count() -> None:
    import numpy as np

    from lora_export.onnx_export.identity import _tensor

    def describe(*values: float, dtype: type) -> str:
        return _tensor(numpy_helper.from_array(np.array(values, dtype)))

    assert describe(1, 2, dtype=np.int64) != describe(1, 3, dtype=np.int64)
    assert describe(1, 2, dtype=np.float32) == describe(1, 3, dtype=np.float32)
    assert describe(1, 2, dtype=np.float32) != describe(1, 2, dtype=np.float16)
    assert describe(1, 2, dtype=np.uint8) == describe(1, 3, dtype=np.uint8)  # packed 4-bit weights
