"""The fused graph beside the plain one: agreement, and a fusion that is wrong."""

from pathlib import Path
from typing import Any

import onnx
import pytest

from lora_export.errors import ExportError
from lora_export.onnx_export import export, load_export
from lora_export.onnx_export.against_plain import compare
from lora_export.progress import Silent
from tests.onnx_export.architectures import DYNAMO, save

QUICK = ("BertModel", "T5ForConditionalGeneration", "CLIPModel")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DYNAMO])
def test_every_fused_graph_agrees_with_the_plain_one(name: str, tmp_path: Path) -> None:
    model = save(DYNAMO[name], tmp_path / "model")
    result = export(model, tmp_path / "onnx", precision="fp32", against_plain=True, progress=Silent())
    assert result.fused_against_plain is not None
    assert 0 <= result.fused_against_plain <= 1e-4
    assert load_export(result.output).as_json()["fused_against_plain"] == result.fused_against_plain
    assert not (result.output / ".plain").exists()


def test_a_wrong_fusion_is_told(bert: Path, tmp_path: Path) -> None:
    """The scale of one fused attention is half of what it is; and an output that is not there."""
    result = export(bert, tmp_path / "fused", precision="fp32", progress=Silent())
    plain = export(bert, tmp_path / "plain", precision="fp32", optimize="none", progress=Silent())
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
    del model.graph.output[-1]
    result.model.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"only one of the graphs|differs by"):
        compare(result.model, plain.model, config)


def test_a_failing_comparison_leaves_no_export(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_export.onnx_export.against_plain.RELATIVE", -1.0)
    with pytest.raises(ExportError, match="--optimize basic"):
        export(bert, tmp_path / "onnx", precision="fp32", against_plain=True, progress=Silent())
    assert not list(tmp_path.iterdir())


def test_nothing_is_compared_that_rounds_otherwise(bert: Path, tmp_path: Path) -> None:
    result = export(bert, tmp_path / "onnx", precision="fp16", against_plain=True, progress=Silent())
    assert result.fused_against_plain is None
