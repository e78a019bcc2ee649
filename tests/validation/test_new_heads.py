"""Validation of a merge whose head the base does not have: the reference is of the class that was trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as t

from lora_export.contracts import AdapterChoice, MergeOptions, ValidationOptions, ValidationResult
from lora_export.errors import LoraExportError
from lora_export.merging import headed_base, merge
from lora_export.progress import Silent
from lora_export.validation import validate
from lora_export.validation.reference.unmerged import load_unmerged
from tests.builders import edit_json, edit_tensors, same_bytes, save_base, tensors
from tests.daily import daily
from tests.heads import CASES, adapter_of, build

EVERY_DAY = ("vit with other labels",)


def check(base: Path, adapter: Path, merged: Path, **asked: int) -> ValidationResult:
    return validate(base, [AdapterChoice(adapter)], merged, options=ValidationOptions(**asked), progress=Silent())


@pytest.mark.parametrize("name", daily(CASES, EVERY_DAY))
def test_validate_honest_merge_passes(name: str, tmp_path: Path) -> None:
    base, adapter = build(CASES[name], tmp_path)
    merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    result = check(base, adapter, tmp_path / "out")
    assert result.passed, [c for c in result.checks if not c.passed]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama reward model", "vit with other labels"])
def test_validate_layer_by_layer_passes(name: str, tmp_path: Path) -> None:
    base, adapter = build(CASES[name], tmp_path)
    merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert check(base, adapter, tmp_path / "out", max_memory=1).passed


def head_of_the_draw(out: Path) -> None:
    edit_tensors(out / "model.safetensors", {"classifier.weight": torch.zeros(5, 48)})


def other_body(out: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    edit_tensors(out / "model.safetensors", {name: tensors(out)[name] * 1.01})


def kept_head(out: Path) -> None:
    edit_tensors(out / "model.safetensors", {"cls.predictions.bias": torch.zeros(101)})


def other_labels(out: Path) -> None:
    edit_json(out / "config.json", id2label={str(i): "x" * i for i in range(5)})


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (head_of_the_draw, "tensor_errors"),
        pytest.param(other_body, "stored_tensors_differ", marks=pytest.mark.slow),
        pytest.param(kept_head, "stored_tensors_differ", marks=pytest.mark.slow),
        pytest.param(other_labels, "settings_differ", marks=pytest.mark.slow),
    ],
)
def test_validate_spoiled_merge_fails(spoil: Callable[[Path], None], found: str, tmp_path: Path) -> None:
    base, adapter = build(CASES["bert tagger on a masked model"], tmp_path)
    merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    spoil(tmp_path / "out")
    failed = {c.name for c in check(base, adapter, tmp_path / "out").checks if not c.passed}
    assert any(found in name for name in failed), failed


def test_validate_merge_without_the_head_is_refused(tmp_path: Path) -> None:
    base, adapter = build(CASES["bert tagger on the body"], tmp_path)
    merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    edit_tensors(tmp_path / "out" / "model.safetensors", {"classifier.weight": None})
    with pytest.raises(LoraExportError, match="does not fill the model"):
        check(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "quantized", [pytest.param("stored", marks=pytest.mark.slow), pytest.param("training", marks=pytest.mark.slow)]
)
def test_validate_reward_model_of_a_4_bit_base_passes(quantized: str, tmp_path: Path) -> None:
    """QLoRA: the body was quantized in training, the new head was not."""
    case = CASES["llama reward model"]
    case = replace(case, config=lambda: t.LlamaConfig(**{**CASES_LLAMA, "hidden_size": 64}))
    plain = save_base(tmp_path / "plain", case.base, case.config(), torch.bfloat16)
    adapter, base = adapter_of(case, plain, tmp_path / "adapter"), plain
    options = MergeOptions(training_quantization="nf4")
    if quantized == "stored":
        how = t.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = case.base.from_pretrained(plain, quantization_config=how, device_map={"": "cpu"})  # type: ignore[attr-defined]
        base, options = tmp_path / "4-bit", MergeOptions()
        model.save_pretrained(base)
    merge(base, [AdapterChoice(adapter)], tmp_path / "out", options)
    asked = ValidationOptions(merge=options)
    result = validate(base, [AdapterChoice(adapter)], tmp_path / "out", options=asked, progress=Silent())
    assert result.passed, [c for c in result.checks if not c.passed]


CASES_LLAMA = {
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 101, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_reference_without_its_adapter_has_the_head(tmp_path: Path) -> None:
    """Else the graph of the base, which has the adapter's head, would be compared with a head of random numbers."""
    base, adapter = build(CASES["vit on the body"], tmp_path)
    model = load_unmerged(base, [AdapterChoice(adapter)], MergeOptions()).model
    saved = tensors(adapter)["base_model.model.classifier.weight"]
    head = model.base_model.model.classifier
    assert torch.equal(head.original_module.weight, saved)
    assert torch.equal(head.modules_to_save["adapter0"].weight, saved)


def test_base_of_a_comparison_has_the_head_and_nothing_else_of_the_adapter(tmp_path: Path) -> None:
    base, adapter = build(CASES["bert tagger on a masked model"], tmp_path)
    choice = [AdapterChoice(adapter)]
    assert headed_base(base, choice, tmp_path / "headed", MergeOptions(), Silent())
    merge(base, choice, tmp_path / "out")
    headed, merged, before = tensors(tmp_path / "headed"), tensors(tmp_path / "out"), tensors(base)
    assert headed.keys() == merged.keys()
    assert all(same_bytes(headed[n], merged[n] if n.startswith("classifier") else before[n]) for n in headed)
    plain = save_base(tmp_path / "plain")
    assert not headed_base(plain, [], tmp_path / "none", MergeOptions(), Silent())
