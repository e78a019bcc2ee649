"""LoRA on nn.MultiheadAttention (SigLIP's pooling head), against PEFT's unmerged forward."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_export.contracts import AdapterChoice, ValidationOptions
from lora_export.errors import AdapterError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import validate
from tests.builders import edit_json, edit_tensors, lora, save_adapter, save_base, siglip_config

MODEL = transformers.SiglipVisionModel
HEAD = "base_model.model.head.attention"


def pair(folder: Path, **settings: Any) -> tuple[Path, Path]:
    base = save_base(folder / "base", MODEL, siglip_config())
    adapter = save_adapter(
        folder / "adapter", base, lora(target_modules=["attention", "q_proj", "fc1"], **settings), MODEL
    )
    return base, adapter


def pooled(model: Any) -> torch.Tensor:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model.eval().double()(pixels.double()).pooler_output
    return found


@pytest.mark.parametrize("settings", [{}, {"alpha_pattern": {"attention": 4}, "rank_pattern": {"attention": 3}}])
def test_merge_attention_equals_unmerged_forward(tmp_path: Path, settings: dict[str, Any]) -> None:
    base, adapter = pair(tmp_path, **settings)
    merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    plain, merged = (MODEL.from_pretrained(f, dtype=torch.float32) for f in (base, tmp_path / "out"))
    exact = pooled(peft.PeftModel.from_pretrained(MODEL.from_pretrained(base, dtype=torch.float32), str(adapter)))
    assert (exact - pooled(plain)).abs().max() > 0.1
    torch.testing.assert_close(pooled(merged), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_validate_attention_compares_effective_weights(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    choice = [AdapterChoice(adapter)]
    merge(base, choice, tmp_path / "out")
    assert validate(base, choice, tmp_path / "out", options=ValidationOptions(), progress=Silent()).passed
    weight = merged_weight(tmp_path / "out", "head.attention.in_proj_weight")
    weight[100, 7] += 1e-3
    edit_tensors(tmp_path / "out" / "model.safetensors", {"head.attention.in_proj_weight": weight})
    result = validate(base, choice, tmp_path / "out", options=ValidationOptions(), progress=Silent())
    assert result.weight_errors == ("head.attention.in_proj_weight",)


def merged_weight(folder: Path, name: str) -> torch.Tensor:
    return MODEL.from_pretrained(folder, dtype=torch.float32).get_parameter(name).detach().clone()


@pytest.mark.parametrize(
    ("changes", "config", "words"),
    [
        ({f"{HEAD}.lora_A.weight": None}, {}, "lora_A of this module is missing"),
        ({f"{HEAD}.base_layer.out_proj.lora_B.weight": None}, {}, "lora_B of this module is missing"),
        ({f"{HEAD}.lora_B.weight": torch.zeros(144, 5)}, {}, "the shapes do not match"),
        ({f"{HEAD}.lora_B.weight": torch.zeros(96, 6)}, {}, "fits a weight of shape"),
        ({}, {"init_lora_weights": "pissa"}, "pissa on nn.MultiheadAttention"),
    ],
)
def test_read_attention_unsupported_settings_is_refused(
    tmp_path: Path, changes: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    base, adapter = pair(tmp_path)
    edit_tensors(adapter / "adapter_model.safetensors", changes)
    edit_json(adapter / "adapter_config.json", **config)
    with pytest.raises(AdapterError, match=words):
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
