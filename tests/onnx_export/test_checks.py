"""External data that leaves the folder is refused before any session."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lora_export.contracts import ExportResult
from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import check_model, count_nodes

Spoil = Callable[[Path, onnx.ModelProto], None]


def external(name: str, **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def write(folder: Path, spoil: Spoil | None = None) -> Path:
    """y = x + w with w, 16 bytes of fp32, in weights.bin."""
    (folder / "weights.bin").write_bytes(np.ones(4, np.float32).tobytes())
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
    weight = external("w", location="weights.bin", offset="0", length="16")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if spoil:
        spoil(folder, model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def entry(key: str, value: str) -> Spoil:
    def spoil(folder: Path, model: onnx.ModelProto) -> None:
        (found,) = [e for e in model.graph.initializer[0].external_data if e.key == key]
        found.value = value

    return spoil


def symlink(folder: Path, model: onnx.ModelProto) -> None:
    (folder / "weights.bin").rename(folder / "other.bin")
    (folder / "weights.bin").symlink_to("other.bin")


def hard_link(folder: Path, model: onnx.ModelProto) -> None:
    os.link(folder / "weights.bin", folder / "other.bin")


def twice(folder: Path, model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data.add(key="location", value="../secret")


def unknown_key(folder: Path, model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data.add(key="__class__", value="x")


def sparse(folder: Path, model: onnx.ModelProto) -> None:
    one = model.graph.sparse_initializer.add()
    one.values.CopyFrom(external("s", location="../secret"))
    one.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [4], range(4)))


def attribute(folder: Path, model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=external("in_attribute", location="../secret"))
    model.graph.node.append(node)


def subgraph(folder: Path, model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [external("inside", location="/etc/passwd")])
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))


def function(folder: Path, model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=external("in_function", location="../secret"))
    model.functions.append(helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 17)]))


def hidden_flag(folder: Path, model: onnx.ModelProto) -> None:
    """Marked as stored inside, with an entry all the same: readers have taken either at its word."""
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.DEFAULT
    tensor.external_data[0].value = "../secret"


@pytest.mark.parametrize(
    ("spoil", "told", "tensor"),
    [
        (entry("location", "../weights.bin"), "'../weights.bin'", "w"),
        (entry("location", "/etc/passwd"), "'/etc/passwd'", "w"),
        (entry("location", ""), "external data at ''", "w"),
        (entry("location", "sub/weights.bin"), "'sub/weights.bin'", "w"),
        (entry("location", "..\\weights.bin"), "weights.bin'", "w"),
        (entry("location", "missing.bin"), "does not exist", "w"),
        (entry("offset", "-1"), "offset '-1'", "w"),
        (entry("length", "-16"), "length '-16'", "w"),
        (entry("length", "17"), "bytes 0 to 17 of 'weights.bin', which has 16", "w"),
        (entry("offset", "1"), "bytes 1 to 17", "w"),
        (entry("offset", "9223372036854775807"), "which has 16", "w"),
        (entry("offset", "1e3"), "offset '1e3'", "w"),
        (symlink, "symbolic link", "w"),
        (hard_link, "hard link", "w"),
        (twice, "'location' twice", "w"),
        (unknown_key, "unknown key '__class__'", "w"),
        (sparse, "'../secret'", "s"),
        (attribute, "'../secret'", "in_attribute"),
        (subgraph, "'/etc/passwd'", "inside"),
        (function, "'../secret'", "in_function"),
        (hidden_flag, "'../secret'", "w"),
    ],
)
def test_check_export_external_data_attack_is_refused(tmp_path: Path, spoil: Spoil, told: str, tensor: str) -> None:
    model = write(tmp_path, spoil)
    with pytest.raises(ExportError) as refusal:
        check_model(model)
    assert told in refusal.value.found
    assert refusal.value.tensor == tensor
    assert refusal.value.where == str(model)


def test_check_export_honest_external_data_passes(tmp_path: Path) -> None:
    check_model(write(tmp_path))
    assert count_nodes(tmp_path / "model.onnx") == 1


def test_check_export_invalid_graph_is_refused(tmp_path: Path) -> None:
    def dangling(folder: Path, model: onnx.ModelProto) -> None:
        model.graph.node[0].input[0] = "nowhere"

    with pytest.raises(ExportError, match="not valid ONNX"):
        check_model(write(tmp_path, dangling))


def test_check_export_not_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ExportError, match="not an ONNX model"):
        check_model(tmp_path / "model.onnx")
    (tmp_path / "link.onnx").symlink_to(write(tmp_path))
    with pytest.raises(ExportError, match="missing or a link"):
        check_model(tmp_path / "link.onnx")


def test_check_export_own_exports_pass(exported: Callable[..., ExportResult], llama: Path) -> None:
    check_model(exported(llama).model)


def test_check_export_does_not_change_file(tmp_path: Path) -> None:
    model = write(tmp_path)
    before = model.read_bytes()
    check_model(model)
    assert model.read_bytes() == before


def test_check_model_norm_of_onnx_runtime_in_a_branch_passes(tmp_path: Path) -> None:
    """It stands in the standard domain, as ONNX Runtime's fusions write it, and two-step decoders have branches."""
    sizes = ["rows", 4]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes) for n in ("x", "y"))
    switch = helper.make_tensor_value_info("switch", TensorProto.BOOL, [1])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [4], [1.0] * 4)

    def branch(name: str, kind: str) -> onnx.GraphProto:
        node = helper.make_node(kind, ["x", "weight"], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)])

    def saved(name: str, kind: str) -> Path:
        branches = {"then_branch": branch("a", kind), "else_branch": branch("b", "Add")}
        graph = helper.make_graph(
            [helper.make_node("If", ["switch"], ["y"], **branches)], "g", [x, switch], [y], [weight]
        )
        domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=domains), tmp_path / name)
        return tmp_path / name

    check_model(saved("norm.onnx", "SimplifiedLayerNormalization"))
    with pytest.raises(ExportError):
        check_model(saved("unknown.onnx", "NoSuchNormalization"))
