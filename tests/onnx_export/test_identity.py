"""Graph identity: other weights are the same work, other operators, types or constants are not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import numpy_helper

from lora_export.contracts import ExportResult, GraphComparison
from lora_export.onnx_export.graphs.canonical import Canonical, canonical
from lora_export.onnx_export.graphs.checks import as_ir, load_graph, open_model
from lora_export.onnx_export.graphs.identity import compare

from .conftest import save_llama

Exported = Callable[..., ExportResult]


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "other", seed=7)


def against(a: Path, b: Path) -> GraphComparison:
    return compare([a], [b], "cpu")


def test_identity_ignores_weights(exported: Exported, llama: Path, other_weights: Path) -> None:
    a, b = exported(llama).model, exported(other_weights).model
    assert a.with_name("model.onnx.data").read_bytes() != b.with_name("model.onnx.data").read_bytes()
    found = against(a, b)
    assert found.identical and found.base_sha256 == found.merged_sha256 and len(found.base_sha256) == 64
    assert found.differences == found.warnings == ()
    assert found.nodes > 20 and set(found.placement) == {"CPUExecutionProvider"}
    assert found.placement["CPUExecutionProvider"] >= found.nodes


def test_identity_detects_unmerged_adapter(exported: Exported, llama: Path, adapter: Path) -> None:
    found = against(exported(llama).model, exported(llama, adapter=adapter).model)
    assert not found.identical and found.base_sha256 != found.merged_sha256
    # 2 layers × 3 projections, A and B each, and the packed projection of q, k, v taken apart
    assert "ai.onnx.MatMul: 11 in the base, 27 in the other" in found.differences
    assert any("lora_A/MatMul: only in the other: ai.onnx.MatMul(·, float[" in line for line in found.differences)


def test_identity_detects_other_type(exported: Exported, llama: Path) -> None:
    half, full = exported(llama, "fp16").model, exported(llama).model
    found = against(half, full)
    assert not found.identical and any("float16" in line for line in found.differences)
    (wider,) = found.warnings
    assert "export both in the same --precision" in wider and "(float)" in wider and "(float16" in wider
    assert not any("--precision" in text for text in against(full, half).warnings)


def test_identity_detects_changed_attribute(exported: Exported, llama: Path, tmp_path: Path) -> None:
    source = exported(llama).model
    model = load_graph(source)
    (node, *_) = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    (scale,) = [a for a in node.attribute if a.name == "scale"]
    scale.f *= 2
    changed = tmp_path / "model.onnx"
    changed.write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes(source.with_name("model.onnx.data").read_bytes())
    found = against(source, changed)
    assert not found.identical
    (difference,) = found.differences
    assert "GroupQueryAttention with scale 0.25 in the base, 0.5 in the other" in difference


# --- the canonical form -------------------------------------------------------------------------------------


def small(*, order: int = 1, prefix: str = "", square: int = 4, axis: int = 1, shared: bool = True) -> Canonical:
    """x·w and x·v, concatenated. shared: w and v are one initializer."""
    import numpy as np
    from onnx import TensorProto, helper

    weights = [numpy_helper.from_array(np.ones((square, square), np.float32) * order, f"{prefix}w")]
    if not shared:
        weights.append(numpy_helper.from_array(np.ones((square, square), np.float32), f"{prefix}v"))
    weights.append(numpy_helper.from_array(np.array([0, -1]), "shape"))
    second = f"{prefix}{'w' if shared else 'v'}"
    products = [
        helper.make_node("MatMul", ["x", f"{prefix}w"], [f"{prefix}a"], name=f"{prefix}1"),
        helper.make_node("MatMul", ["x", second], [f"{prefix}b"], name=f"{prefix}2"),
    ][::order]
    ends = [
        helper.make_node("Concat", [f"{prefix}a", f"{prefix}b"], ["c"], axis=axis),
        helper.make_node("Reshape", ["c", "shape"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", square])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])
    graph = helper.make_graph([*products, *ends], "g", [given], [out], weights)
    return canonical(as_ir(helper.make_model(graph)), {"CPUExecutionProvider": 4})


def test_identity_ignores_names_order_and_values() -> None:
    assert small().sha256 == small(prefix="other/").sha256 == small(order=-1).sha256
    apart = small(shared=False, axis=0)
    turned = replace(apart, nodes=apart.nodes[::-1])
    assert len({n.digest for n in apart.nodes}) > 2 and turned.sha256 == apart.sha256


@pytest.mark.parametrize("change", [{"square": 5}, {"axis": 0}, {"shared": False}])
def test_identity_compares_shapes_attributes_and_sharing(change: dict[str, int]) -> None:
    assert small().sha256 != small(**change).sha256  # type: ignore[arg-type]


def test_identity_compares_wiring_and_placement() -> None:
    from onnx import TensorProto, helper

    def chain(*steps: tuple[str, str, str]) -> Canonical:
        nodes = [helper.make_node(op, [a], [b]) for op, a, b in steps]
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in ("x", "y")]
        return canonical(as_ir(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]))), {})

    one = chain(("Abs", "x", "a"), ("Neg", "x", "b"), ("Abs", "b", "y"))
    other = chain(("Abs", "x", "a"), ("Neg", "a", "b"), ("Abs", "b", "y"))
    assert [n.local for n in one.nodes] == [n.local for n in other.nodes] and one.sha256 != other.sha256
    assert replace(one, placement={"CUDAExecutionProvider": 3}).sha256 != one.sha256


def test_identity_warns_of_slow_settings_and_shapes(exported: Exported, llama: Path, tmp_path: Path) -> None:
    import json
    import shutil

    base = exported(llama).model.parent
    slow = Path(shutil.copytree(base, tmp_path / "slow"))
    config = json.loads((slow / "config.json").read_text())
    (slow / "config.json").write_text(json.dumps(config | {"use_cache": False, "tie_word_embeddings": False}))
    before = json.loads((base / "config.json").read_text())
    found = against(base / "model.onnx", slow / "model.onnx")
    assert found.identical
    assert any("use_cache false" in text for text in found.warnings)
    assert any("ties" in text for text in found.warnings) == bool(before.get("tie_word_embeddings"))


def test_identity_warns_of_lost_fusions_and_untied_embeddings() -> None:
    from lora_export.onnx_export.graphs.canonical import Node
    from lora_export.onnx_export.graphs.identity import _graph_warnings

    def of(*operators: str, tied: bool) -> Canonical:
        nodes = tuple(Node(f"n{i}", operator, "", (), str(i)) for i, operator in enumerate(operators))
        return Canonical((), nodes, (), {"FLOAT": 100}, tied, {})

    gqa = "com.microsoft.GroupQueryAttention"
    fused, apart = of(gqa, gqa, "ai.onnx.MatMul", tied=True), of(gqa, "ai.onnx.MatMul", tied=False)
    untied, lost = _graph_warnings(fused, apart)
    assert "share one weight" in untied
    assert lost == "1 fewer GroupQueryAttention in the merged graph: fusions were lost"
    assert list(_graph_warnings(apart, fused)) == []


def test_identity_recognizes_transposed_tied_embedding(exported: Exported, llama: Path) -> None:
    import json

    tied = canonical(open_model(exported(llama).model), {}).tied
    assert tied == json.loads((llama / "config.json").read_text())["tie_word_embeddings"]
