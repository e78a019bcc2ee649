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
from lora_export.storage.documents import as_json
from tests.daily import daily
from tests.onnx_export.architectures import DYNAMO, save

QUICK = ()


@pytest.mark.parametrize("name", daily(DYNAMO, QUICK))
def test_fused_graph_agrees_with_unfused(name: str, tmp_path: Path) -> None:
    model = save(DYNAMO[name], tmp_path / "model")
    result = export(model, tmp_path / "onnx", ExportOptions("fp32", "cpu"), against_plain=True, progress=Silent())
    assert result.fused_against_plain is not None
    assert 0 <= result.fused_against_plain <= 1e-4
    assert as_json(load_export(result.output))["fused_against_plain"] == result.fused_against_plain
    assert not (result.output / ".plain").exists()


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


@pytest.mark.slow
def test_fused_graph_refused_leaves_no_export(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_export.onnx_export.graphs.fusions.RELATIVE", -1.0)
    with pytest.raises(ExportError, match="--optimize basic"):
        export(bert, tmp_path / "onnx", ExportOptions("fp32", "cpu"), against_plain=True, progress=Silent())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fused_graph_in_low_precision_is_not_compared(bert: Path, tmp_path: Path) -> None:
    result = export(bert, tmp_path / "onnx", ExportOptions("fp16", "cpu"), against_plain=True, progress=Silent())
    assert result.fused_against_plain is None
