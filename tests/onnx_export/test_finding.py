"""Every file that a runtime may open as a model is found, whatever it is called."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.finding import find_graphs, looks_like_graph


def graph_bytes(location: str | None = None) -> bytes:
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    weight = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
    if location:
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    return onnx.helper.make_model(graph).SerializeToString()


UNKNOWN = bytes([0xFA, 0x07, 0x03]) + b"abc"  # field 127, which no model has
GROUP = bytes([0xFB, 0x07, 0x08, 0x01, 0xFC, 0x07])  # the same as a group with a field in it


@pytest.mark.parametrize("extra", [b"", UNKNOWN, GROUP, UNKNOWN * 70_000])
@pytest.mark.parametrize("name", ["graph.dat", "weights.json", "noext"])
def test_find_graphs_of_another_name_finds_them_by_content(tmp_path: Path, name: str, extra: bytes) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_bytes(extra + graph_bytes())
    onnx.load_from_string(extra + graph_bytes())  # a runtime reads it
    assert find_graphs(tmp_path) == [tmp_path / "sub" / name]


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 5000, b"{}", np.linspace(-1, 1, 9999, dtype=np.float32).tobytes(), b"\x12\xff\xff\xff\xff\x0f"],
)
def test_looks_like_graph_of_other_files_is_false(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    assert not looks_like_graph(tmp_path / "x")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("genai_config.json", json.dumps({"model": {"decoder": {"filename": "graph.dat"}}})),
        ("config.pbtxt", 'name: "x"\ndefault_model_filename: "graph.dat"'),
        ("config.pbtxt", "default_model_filename : 'graph.dat'"),
        ("export.json", json.dumps({"graphs": ["graph.dat"]})),
    ],
)
def test_find_graphs_takes_what_a_configuration_names(tmp_path: Path, config: str, text: str) -> None:
    """Even if it is no graph by its content: the check that follows refuses it."""
    (tmp_path / config).write_text(text)
    with pytest.raises(ExportError, match="does not exist"):
        find_graphs(tmp_path)
    (tmp_path / "graph.dat").write_bytes(b"no graph")
    assert find_graphs(tmp_path) == [tmp_path / "graph.dat"]


@pytest.mark.parametrize("name", ["../graph.dat", "/etc/passwd", "a/b", "C:x"])
def test_find_graphs_refuses_a_name_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps({"filename": name}))
    with pytest.raises(ExportError, match="a model named"):
        find_graphs(tmp_path)


@pytest.mark.parametrize(("name", "data"), [("model.ort", b"x"), ("weights.data", b"\0\0\0\0ORTM\0\0")])
def test_find_graphs_refuses_a_format_that_cannot_be_checked(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ExportError, match="own format"):
        find_graphs(tmp_path)
