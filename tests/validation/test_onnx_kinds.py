"""ONNX graphs of every kind of model against the unmerged one: honest ones pass, those without the adapter fail."""

from pathlib import Path

import pytest

from lora_export.contracts import AdapterChoice, ExportedPair, ExportOptions, ValidationResult
from lora_export.errors import ExportError
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight
from lora_export.progress import Silent
from tests.daily import daily
from tests.onnx_export.architectures import DYNAMO, GENAI, save, save_adapter
from tests.validation.conftest import judged

KINDS = {
    "BertForQuestionAnswering": {"onnx_logits_max_abs", "onnx_end_logits_max_abs"},
    "MarianMTModel": {"onnx_logits_max_abs", "onnx_greedy_agreement", "onnx_token_agreement"},
    "WhisperForConditionalGeneration": {"onnx_logits_max_abs", "onnx_greedy_agreement", "onnx_token_agreement"},
    "ViTForImageClassification": {"onnx_logits_max_abs", "onnx_embedding_cosine"},
    "CLIPModel": {"onnx_logits_max_abs", "onnx_text_embeds_max_abs", "onnx_image_embeds_max_abs"},
    "Wav2Vec2ForCTC": {"onnx_logits_max_abs", "onnx_embedding_cosine"},
}


@pytest.mark.parametrize("name", daily(KINDS, ("WhisperForConditionalGeneration", "BertForQuestionAnswering")))
def test_validate_graph_of_every_kind_passes(name: str, tmp_path: Path) -> None:
    architecture = (DYNAMO | GENAI)[name]
    base = save(architecture, tmp_path / "base")
    save_adapter(architecture, base, tmp_path / "adapter")
    adapters = [AdapterChoice(tmp_path / "adapter")]
    merge(base, adapters, tmp_path / "merged")
    plain = export(base, tmp_path / "base-onnx", ExportOptions("fp32", "cpu"), progress=Silent())
    merged = reweight(plain.output, tmp_path / "merged", tmp_path / "onnx", progress=Silent())

    def validated(onnx: Path) -> ValidationResult:
        pair = ExportedPair(onnx, plain.output, "fp32", 1, graphs=merged.graphs)
        return judged(base, adapters, tmp_path / "merged", [pair])

    honest = validated(merged.output)
    assert honest.passed, [c for c in honest.checks if not c.passed]
    assert KINDS[name] <= {c.name for c in honest.checks}
    without = validated(plain.output)  # the base's numbers in place of the merged ones
    failed = {c.name for c in without.checks if not c.passed}
    assert KINDS[name] <= failed
    assert all(name.startswith("onnx_") for name in failed)


def test_validate_graph_of_other_model_fails(tmp_path: Path) -> None:
    """By its numbers, before anything runs."""
    other = save(DYNAMO["ViTForImageClassification"], tmp_path / "other")
    exported = export(other, tmp_path / "onnx", ExportOptions("fp32", "cpu"), progress=Silent())
    architecture = DYNAMO["BertModel"]
    base = save(architecture, tmp_path / "base")
    save_adapter(architecture, base, tmp_path / "adapter")
    adapters = [AdapterChoice(tmp_path / "adapter")]
    merge(base, adapters, tmp_path / "merged")
    pair = ExportedPair(exported.output, exported.output, "fp32", 1)
    with pytest.raises(ExportError, match="holds none of this model's tensors"):
        judged(base, adapters, tmp_path / "merged", [pair])
