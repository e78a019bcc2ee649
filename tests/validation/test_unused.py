"""An update that PEFT's unmerged forward never uses: said of the reference, by name, and only where it is so."""

from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora_export.commands.words import validation_words
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.merging import merge
from lora_export.storage.documents import as_json
from tests.builders import edit_tensors, randomize, siglip_config
from tests.validation.conftest import judged

POOLED = "head.attention.out_proj"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """SigLIP's vision tower, whose pooling head is an nn.MultiheadAttention, all linear layers trained; (base,
    adapter, merged)."""
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    model = transformers.SiglipVisionModel(siglip_config(8))
    randomize(model, 1, scale=0.15)
    model.save_pretrained(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    assert POOLED in tuned.targeted_module_names
    randomize(tuned, 2, tuple(n for n, p in tuned.named_parameters() if p.requires_grad), 0.1)
    tuned.save_pretrained(adapter)
    merge(base, [AdapterChoice(adapter)], merged)
    return base, adapter, merged


def test_validate_an_update_that_the_reference_does_not_use_is_named(folders: tuple[Path, Path, Path]) -> None:
    result = judged(*folders, seed=3)
    assert not result.passed and result.weight_errors == ()
    assert result.unused_updates == (POOLED,)
    assert as_json(result)["unused_updates"] == [POOLED]
    assert f"The reference does not use the adapter's update of {POOLED}" in validation_words(result)


def test_validate_an_update_of_zero_or_another_fault_names_none(folders: tuple[Path, Path, Path]) -> None:
    """Training leaves the update of a layer that nothing calls at zero, and then the merge is right."""
    base, adapter, merged = folders
    name = f"base_model.model.{POOLED}.lora_B.weight"
    edit_tensors(adapter / "adapter_model.safetensors", {name: torch.zeros(48, 4)})
    merge(base, [AdapterChoice(adapter)], merged, MergeOptions(force=True))
    assert judged(base, adapter, merged, seed=3).passed
    edit_tensors(merged / "model.safetensors", {"post_layernorm.weight": torch.ones(48)})
    result = judged(base, adapter, merged, seed=3)
    assert not result.passed and result.unused_updates == () and result.advice == ()
