"""Adapters and bases under the names of each generation of transformers: merged alike, and validated."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError
from lora_export.merging import merge
from tests.builders import VOCABULARY, edit_json, randomize
from tests.daily import daily
from tests.validation.conftest import judged
from tests.validation.generations import CELLS, FAMILIES

ADAPTER = "adapter_model.safetensors"
OLD_ON_NEW = [("vit", "4", "5", True), ("gemma3", "4", "4.52", False), ("qwen2_vl", "4", "5", False)]


def in_model(family: str, folder: Path) -> dict[str, torch.Tensor]:
    model, told = FAMILIES[family].model.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return dict(model.state_dict())


@pytest.mark.parametrize(("name", "of_adapter", "of_base", "saved"), daily(CELLS, OLD_ON_NEW))
def test_merge_names_of_any_generation_gives_same_model(
    tmp_path: Path, name: str, of_adapter: str, of_base: str, saved: bool
) -> None:
    family = FAMILIES[name]
    wanted, merged = tmp_path / "wanted", tmp_path / "merged"
    today = family.save(tmp_path / "base-5", "5"), family.train(tmp_path / "adapter-5", "5", saved)
    merge(today[0], [AdapterChoice(today[1])], wanted)
    base = family.save(tmp_path / "base", of_base)
    adapter = family.train(tmp_path / "adapter", of_adapter, saved)
    merge(base, [AdapterChoice(adapter)], merged)
    before, right, found = (in_model(name, folder) for folder in (today[0], wanted, merged))
    assert [n for n in right if not torch.equal(right[n], found[n])] == []
    assert any(not torch.equal(right[n], before[n]) for n in right)
    result = judged(base, adapter, merged, seed=3)
    assert result.passed, [c for c in result.checks if not c.passed]


@pytest.mark.parametrize("name", daily(("vit", "qwen2_5_vl"), ("vit",)))
def test_validate_of_older_names_a_spoiled_tensor_fails(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    base, adapter = family.save(tmp_path / "base", "4"), family.train(tmp_path / "adapter", "4")
    merged = tmp_path / "merged"
    merge(base, [AdapterChoice(adapter)], merged)
    state = load_file(merged / "model.safetensors")
    victim = next(n for n in state if n.endswith(("value.weight", "q_proj.weight")))
    state[victim] *= 1.01
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    result = judged(base, adapter, merged, seed=3)
    assert not result.passed and len(result.weight_errors) == 1


def test_validate_ranks_of_older_names_are_read_by_the_older_names(tmp_path: Path) -> None:
    """alpha_pattern for one module of one layer: by today's names the expression would match none."""
    family = FAMILIES["vit"]
    base, adapter = family.save(tmp_path / "base", "4"), family.train(tmp_path / "adapter", "4")
    edit_json(adapter / "adapter_config.json", alpha_pattern={r"layer\.1\.attention\.attention\.query": 24})
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    assert judged(base, adapter, tmp_path / "merged", seed=3).passed
    edit_json(adapter / "adapter_config.json", alpha_pattern={r"layer\.1\.attention\.attention\.query": 25})
    assert not judged(base, adapter, tmp_path / "merged", seed=3).passed


def test_validate_an_adapter_of_a_text_model_on_a_model_that_sees(tmp_path: Path) -> None:
    """`model.layers` of the text alone is `model.language_model.layers` where images are read, too."""
    family = FAMILIES["llava"]
    base, adapter = family.save(tmp_path / "base", "5"), family.train(tmp_path / "adapter", "5")
    state = load_file(adapter / ADAPTER)
    text = {n.replace(".language_model", ""): t for n, t in state.items() if ".language_model." in n}
    save_file(text, adapter / ADAPTER, metadata={"format": "pt"})
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "v_proj"])
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged", MergeOptions())
    result = judged(base, adapter, tmp_path / "merged", seed=3)
    assert result.passed, [c for c in result.checks if not c.passed]


def test_validate_names_of_no_model_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["vit"]
    base, adapter = family.save(tmp_path / "base", "5"), family.train(tmp_path / "adapter", "5")
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    state = load_file(adapter / ADAPTER)
    other = {n.replace("q_proj", "queries").replace("v_proj", "values"): t for n, t in state.items()}
    save_file(other, adapter / ADAPTER, metadata={"format": "pt"})
    edit_json(adapter / "adapter_config.json", target_modules=["queries", "values", "fc2"])
    with pytest.raises(AdapterError, match="no place in ViTForImageClassification"):
        judged(base, adapter, tmp_path / "merged", seed=3)


def test_validate_names_that_peft_itself_changes_on_loading(tmp_path: Path) -> None:
    """PEFT saves the modules' names, and its own loading makes names of none of them: the merge is right."""
    config = transformers.LagunaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=32, max_position_embeddings=300, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, layer_types=["full_attention", "sliding_attention"], sliding_window=20,
        mlp_layer_types=["dense", "sparse"], num_attention_heads_per_layer=[4, 4],
    )  # fmt: skip
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    model = transformers.LagunaForCausalLM(config)
    randomize(model, 1, scale=0.15)
    model.save_pretrained(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    randomize(tuned, 2, tuple(n for n, p in tuned.named_parameters() if p.requires_grad), 0.1)
    tuned.save_pretrained(adapter)
    merge(base, [AdapterChoice(adapter)], merged)

    modules = {n for n, _ in transformers.LagunaForCausalLM.from_pretrained(base).named_modules()}
    saved = {n.removeprefix("base_model.model.").split(".lora_")[0] for n in load_file(adapter / ADAPTER)}
    assert saved <= modules
    again = peft.PeftModel.from_pretrained(transformers.LagunaForCausalLM.from_pretrained(base), adapter)
    left = again.load_adapter(adapter, adapter_name="again").unexpected_keys
    assert {n.split(".lora_")[0] for n in left} == {"base_model.model.model.layers.1.mlp.shared_experts..up_proj"}

    loaded = transformers.LagunaForCausalLM.from_pretrained(merged).double().eval()
    for either in (model, loaded):
        either.set_experts_implementation("eager")  # the others know no float64
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(tuned.double().eval()(ids).logits, loaded(ids).logits, rtol=0, atol=1e-5)
    assert judged(base, adapter, merged, seed=3).passed
