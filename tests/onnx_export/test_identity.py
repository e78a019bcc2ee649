"""Graph identity: other weights are the same work, other operators, types or constants are not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import numpy_helper

from lora_export.contracts import ExportResult, GraphComparison
from lora_export.onnx_export.graphs import identity
from lora_export.onnx_export.graphs.canonical import Canonical, canonical
from lora_export.onnx_export.graphs.checks import as_ir, load_graph, open_model
from lora_export.onnx_export.graphs.identity import compare, one_stored

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


# --- equal files --------------------------------------------------------------------------------------------


def stored(folder: Path, **changed: float) -> Path:
    """A graph whose constants lie in a data file: a large weight, an epsilon, repeats, and codes."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    values = {"large": 1.0, "epsilon": 1e-5, "times": 2, "codes": 3} | changed
    folder.mkdir()
    weights = [
        numpy_helper.from_array(np.full((16, 16), values["large"], np.float32), "large"),
        numpy_helper.from_array(np.full((8,), values["epsilon"], np.float32), "epsilon"),
        numpy_helper.from_array(np.full((4, 100), values["times"], np.float32), "times"),
        numpy_helper.from_array(np.full((16, 16), values["codes"], np.uint8), "codes"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["a"]),
        helper.make_node("Cast", ["codes"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["a", "b"], ["c"]),
        helper.make_node("Concat", ["c", "c"], ["d"], axis=1),
        helper.make_node("Split", ["d"], ["e", "f", "g", "h"], axis=1, num_outputs=4),
        helper.make_node("Add", ["e", "epsilon"], ["i"]),
        helper.make_node("ReduceMax", ["times", "one"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["fours"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["i", "zero"], ["j"]),
        helper.make_node("Unsqueeze", ["j", "zero"], ["k"]),
        helper.make_node("Tile", ["k", "fours"], ["y"]),
    ]
    weights += [numpy_helper.from_array(np.array([n]), name) for n, name in enumerate(("zero", "one"))]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["o", "p", "q", "r"])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [given], [out], weights), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 9
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=50
    )
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("changed", "one"),
    [({"large": 7.0}, True), ({"epsilon": 1e-6}, False), ({"times": 3}, False), ({"codes": 4}, False)],
)
def test_equal_files_are_one_graph_unless_a_constant_that_counts_differs(
    tmp_path: Path, changed: dict[str, float], one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, merged = stored(tmp_path / "base"), stored(tmp_path / "merged", **changed)
    assert base.read_bytes() == merged.read_bytes() and one_stored(base, merged) is one
    looked, real = [], identity.optimized
    monkeypatch.setattr(
        identity, "optimized", lambda model, provider: looked.append(model) or real(model, provider)
    )
    found = against(base, merged)
    assert looked == ([merged] if one else [merged, base])
    assert found.identical is ("times" not in changed)  # how often a value is repeated is work
    merged.write_bytes(merged.read_bytes() + b"\x12\x01x")  # another producer's name
    assert not one_stored(base, merged) and against(base, merged).identical is found.identical


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
