"""What the architecture knows: tensors that loading takes apart, and in which order a module has its parameters."""

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
from tests.builders import edit_tensors, load, lora, save_adapter, save_base, tensors, token_ids

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 12, "vocab_size": 101,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# hrm_text stores the gate, q, k and v of its attention as one tensor, and gate and up of its MLP.
CHUNKED = (
    transformers.HrmTextForCausalLM,
    transformers.HrmTextConfig(**SIZES, intermediate_size=80, num_key_value_heads=4),
)
RECURRENT = (
    transformers.RecurrentGemmaForCausalLM,
    transformers.RecurrentGemmaConfig(
        **SIZES, intermediate_size=160, num_key_value_heads=1, lru_width=48, attention_window_size=32,
        block_types=["recurrent", "attention"],
    ),
)  # fmt: skip
GATES = ["rg_lru.input_gate_bias", "rg_lru.recurrent_gate_weight", "rg_lru.input_gate_weight"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(token_ids()).logits
    return found


def compared(folder: Path, cls: Any, config: Any, adapter: peft.LoraConfig) -> None:
    base = save_base(folder / "base", cls, config)
    trained = save_adapter(folder / "adapter", base, adapter, cls, scale=0.05)
    merge(base, [AdapterChoice(trained)], folder / "out")
    exact = logits(peft.PeftModel.from_pretrained(load(base, cls), str(trained)))
    assert (exact - logits(load(base, cls))).abs().max() > 0.05
    torch.testing.assert_close(logits(load(folder / "out", cls)), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "adapter",
    [
        lora(target_modules=["k_proj", "v_proj", "up_proj", "o_proj"]),
        lora(target_modules=["q_proj", "gate_proj"], use_dora=True),
        lora(target_modules=["o_proj"], modules_to_save=["layers.0.self_attn.v_proj"]),
    ],
    ids=["lora", "dora", "saved"],
)
def test_split_on_loading_updates_rows(tmp_path: Path, adapter: peft.LoraConfig) -> None:
    compared(tmp_path, *CHUNKED, adapter)
    assert any(name.endswith("gqkv_proj.weight") for name in tensors(tmp_path / "out"))


@pytest.mark.slow
def test_validate_split_on_loading_flags_other_rows(tmp_path: Path) -> None:
    cls, config = CHUNKED
    base = save_base(tmp_path / "base", cls, config)
    choice = [AdapterChoice(save_adapter(tmp_path / "a", base, lora(target_modules=["q_proj"]), cls, scale=0.05))]
    merge(base, choice, tmp_path / "out")
    options = ValidationOptions()
    assert validate(base, choice, tmp_path / "out", options=options, progress=Silent()).passed


def test_split_on_loading_follows_module_order(tmp_path: Path) -> None:
    """Of no order that their names have; two are of one shape, so that they would fit exchanged."""
    compared(tmp_path, *RECURRENT, lora(target_modules=["q_proj"], target_parameters=GATES))


def test_split_on_loading_misfit_is_refused(tmp_path: Path) -> None:
    cls, config = CHUNKED
    base = save_base(tmp_path / "base", cls, config)
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["k_proj"]), cls)
    key = "base_model.model.model.H_module.layers.0.self_attn.k_proj.lora_B.weight"
    edit_tensors(adapter / "adapter_model.safetensors", {key: torch.zeros(36, 6)})
    with pytest.raises(AdapterError, match=r"the loaded model has \[48, 48\]"):
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
