"""The fused graph beside the plain one: agreement, and a fusion that is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from lora_export.contracts import ExportOptions, ExportResult
from lora_export.errors import ExportError
from lora_export.onnx_export import export, load_export
from lora_export.onnx_export.graphs.fusions import compare
from lora_export.progress import Silent


def test_fused_graph_with_wrong_fusion_is_refused(
    exported: Callable[..., ExportResult], bert: Path, tmp_path: Path
) -> None:
    """The scale of one fused attention is half of what it is; and an output has another name."""
    shutil.copytree(exported(bert).output, tmp_path / "fused")
    result = load_export(tmp_path / "fused")
    plain = export(bert, tmp_path / "plain", ExportOptions("fp32", "cpu", optimize="none"), progress=Silent())
    config: dict[str, Any] = {"max_position_embeddings": 64}
    assert compare(result.model, plain.model, config) <= 1e-4
    model = onnx.load(result.model, load_external_data=False)
    attention = next(n for n in model.graph.node if "Attention" in n.op_type)
    for attribute in list(attention.attribute):
        if attribute.name == "scale":
            attention.attribute.remove(attribute)
    attention.attribute.append(onnx.helper.make_attribute("scale", 0.125))
    result.model.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="differs by"):
        compare(result.model, plain.model, config)
    plain_model = onnx.load(plain.model, load_external_data=False)
    last = next(n for n in plain_model.graph.node if plain_model.graph.output[0].name in n.output)
    last.output[0] = plain_model.graph.output[0].name = "other"
    plain.model.write_bytes(plain_model.SerializeToString())
    with pytest.raises(ExportError, match="only one of the graphs has the output"):
        compare(result.model, plain.model, config)
