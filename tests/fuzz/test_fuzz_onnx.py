"""ONNX files: their protobuf, where their weights lie, and the record of an export."""

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper

from lora_export.contracts import ExportResult
from lora_export.errors import LoraExportError
from lora_export.onnx_export import check_model, load_export
from lora_export.onnx_export.graphs.checks import all_tensors, count_nodes
from lora_export.storage.documents import as_json
from lora_export.workflows.inspection import inspect_folder
from tests.fuzz.guard import attempt, harness
from tests.fuzz.strategies import ODD_TEXTS, damaged_bytes, json_files

WEIGHTS = np.arange(8, dtype=np.float32).tobytes()


def external(name: str, dims: list[int], **fields: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def valid() -> onnx.ModelProto:
    """y = x + w + If(c, 1, 2), with weights in another file, in the graph, and in a subgraph."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    w = external("w", [4], location="weights.bin", offset="16", length="16")
    v = helper.make_tensor("v", TensorProto.FLOAT, [4], np.ones(4, np.float32).tobytes(), raw=True)
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
    inner = external("inner", [4], location="weights.bin", offset="0", length="16")
    branch = helper.make_graph([helper.make_node("Identity", ["inner"], ["z"])], "then", [], [z], [inner])
    nodes = [
        helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "v"], ["b"]),
        helper.make_node("Add", ["b", "z"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x, c], [y], [w, v])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


VALID = valid()
BYTES = VALID.SerializeToString()
LOCATIONS = [
    "weights.bin", "../secret", "/etc/passwd", "sub/w", "..", ".", "link.bin", "sub", "model.onnx", "x" * 300,
]  # fmt: skip
NUMBERS = [
    "0", "16", "32", "33", "-1", "1e3", "", " 1", "+1", "0x10", "٣", "9" * 19, "9" * 5000, str(2**63), str(2**64),
]  # fmt: skip
CHANGES = ["value", "value", "value", "add", "clear", "dims", "type", "place", "node", "put"]
DIMENSIONS = st.sampled_from([0, 1, 4, -1, 2**31, 2**63 - 1, -(2**63)])
WELL_FORMED = [t for t in ODD_TEXTS if "\ud800" not in t]


@st.composite
def models(draw: st.DrawFn) -> bytes:
    """The model with one to four fields of its tensors and nodes changed, or with its bytes damaged."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(BYTES) | st.binary(max_size=60))
    model = onnx.ModelProto.FromString(BYTES)
    for _ in range(draw(st.integers(1, 4))):
        tensors = list(all_tensors(model))
        tensor = draw(st.sampled_from(tensors)) if tensors else model.graph.initializer.add()
        match draw(st.sampled_from(CHANGES)):
            case "value" if tensor.external_data:
                entry = draw(st.sampled_from(list(tensor.external_data)))
                entry.value = draw(st.sampled_from([*LOCATIONS, *NUMBERS, *WELL_FORMED]))
            case "add":
                key = draw(st.sampled_from(["location", "offset", "length", "checksum", "basepath", ""]))
                tensor.external_data.add(key=key, value=draw(st.sampled_from([*LOCATIONS, *NUMBERS])))
            case "clear":
                tensor.ClearField(draw(st.sampled_from(["external_data", "dims", "data_type", "name", "raw_data"])))
            case "dims":
                del tensor.dims[:]
                tensor.dims.extend(draw(st.lists(DIMENSIONS, max_size=4)))
            case "type":
                tensor.data_type = draw(st.integers(-1, 30))
            case "place":
                tensor.data_location = draw(st.sampled_from([TensorProto.DEFAULT, TensorProto.EXTERNAL]))
            case "node":
                node = model.graph.node.add(op_type=draw(st.sampled_from(["Constant", "Loop", "Add", "", "\0"])))
                node.domain = draw(st.sampled_from(["", "ai.onnx", "com.microsoft", "x"]))
                node.output.append(draw(st.sampled_from(["y", "n", ""])))
            case _:
                _put(draw, model)
    return model.SerializeToString()


def _put(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    """One more tensor in a place where a reader may not look."""
    spoiled = external("put", [4], location=draw(st.sampled_from(LOCATIONS)))
    match draw(st.sampled_from(["attribute", "tensors", "sparse", "function", "training", "metadata"])):
        case "attribute":
            model.graph.node.append(helper.make_node("Constant", [], ["p"], value=spoiled))
        case "tensors":
            attribute = AttributeProto(name="t", type=AttributeProto.TENSORS, tensors=[spoiled])
            model.graph.node[0].attribute.append(attribute)
        case "sparse":
            model.graph.sparse_initializer.add().values.CopyFrom(spoiled)
        case "function":
            node = helper.make_node("Constant", [], ["p"], value=spoiled)
            model.functions.append(helper.make_function("d", "f", [], ["p"], [node], [helper.make_opsetid("", 17)]))
        case "training":
            model.training_info.add().algorithm.initializer.append(spoiled)
        case _:
            model.metadata_props.add(key="location", value="../secret")


@harness(120, content=models())
def test_onnx_model(content: bytes) -> None:
    """What is accepted has all its weights inside plain files of its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "onnx")
        (folder / "sub").mkdir(parents=True)
        (Path(name) / "secret").write_bytes(WEIGHTS)
        (folder / "weights.bin").write_bytes(WEIGHTS)
        (folder / "link.bin").symlink_to("../secret")
        (folder / "model.onnx").write_bytes(content)
        checked = attempt(folder, lambda: check_model(folder / "model.onnx"))
        assert (folder / "model.onnx").read_bytes() == content
        if isinstance(checked, LoraExportError):
            return
        assert attempt(folder, lambda: count_nodes(folder / "model.onnx")) == len(
            onnx.ModelProto.FromString(content).graph.node
        )
        for tensor in all_tensors(onnx.ModelProto.FromString(content)):
            fields = {e.key: e.value for e in tensor.external_data}
            if fields:
                assert fields["location"] in ("weights.bin", "model.onnx")
                size = (folder / fields["location"]).stat().st_size
                assert 0 <= int(fields.get("offset", 0)) + int(fields.get("length", 0)) <= size


RECORD = {"engine": "genai", "precision": "fp32", "kind": "decoder", "nodes": 4, "seconds": 1.5, "provider": "cpu"}


@harness(80, record=json_files(RECORD, tuple(RECORD)))
def test_export_record(record: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(BYTES)
        (folder / "weights.bin").write_bytes(WEIGHTS)
        (folder / "export.json").write_bytes(record)
        found = attempt(folder, lambda: load_export(folder))
        described = attempt(folder, lambda: inspect_folder(folder))
        assert isinstance(found, ExportResult) == isinstance(described, dict)
        if isinstance(found, ExportResult) and isinstance(described, dict):
            json.dumps(as_json(found), ensure_ascii=False, allow_nan=False).encode()
            json.dumps(described, ensure_ascii=False, allow_nan=False).encode()
