"""Tinker's LoRA on q, k, v of a linear attention, against the layer's own forward with each part changed apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lora_export.contracts import AdapterChoice, ValidationOptions
from lora_export.errors import AdapterError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import validate
from tests.builders import edit_json, save_base, token_ids

RANK, ALPHA = 6, 15
WIDTH, HEADS, GROUP, KEY, VALUE = 48, 2, 2, 12, 10  # GROUP: heads of the values for one of the keys
OUT = {"q": HEADS * KEY, "k": HEADS * KEY, "v": HEADS * GROUP * VALUE}
OUT |= {"z": OUT["v"], "b": HEADS * GROUP, "a": HEADS * GROUP}
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 101, "max_position_embeddings": 64,
    "linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS * GROUP, "linear_key_head_dim": KEY,
    "linear_value_head_dim": VALUE, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MODELS = {
    "qwen3.5": (transformers.Qwen3_5ForCausalLM, transformers.Qwen3_5TextConfig, "qkv"),
    "qwen3-next": (transformers.Qwen3NextForCausalLM, transformers.Qwen3NextConfig, "qkvzba"),
}
LINEAR = "model.layers.0.linear_attn"


def model_base(folder: Path, name: str) -> Path:
    cls, config, _ = MODELS[name]
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 20}
    experts |= {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 5, "mlp_only_layers": [0, 1]}
    return save_base(folder, cls, config(**(SIZES | (experts if name == "qwen3-next" else {}))))


def trained(name: str) -> dict[str, torch.Tensor]:
    """Module → A and B of Tinker's adapter: the parts, another layer, and the head under its name there."""
    shapes = {f"{LINEAR}.in_proj_{p}": (WIDTH, OUT[p]) for p in MODELS[name][2]}
    shapes |= {"model.layers.1.mlp.down_proj": (80, WIDTH), "model.unembed_tokens": (WIDTH, 101)}
    generator = torch.Generator().manual_seed(4)
    values = {}
    for module, (width, out) in shapes.items():
        values[f"{module}.lora_A"] = torch.randn(RANK, width, generator=generator) * 0.3
        values[f"{module}.lora_B"] = torch.randn(out, RANK, generator=generator) * 0.3
    return values


def save(folder: Path, values: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    tensors = {f"base_model.model.{n}.weight": v for n, v in values.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def unmerged(base: Path, name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits with x·Aᵀ·Bᵀ added to each part where the layer has taken its projection apart."""
    model: Any = MODELS[name][0].from_pretrained(base, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}

    def added(module: str, x: torch.Tensor) -> torch.Tensor:
        return ALPHA / RANK * x @ values[f"{module}.lora_A"].T @ values[f"{module}.lora_B"].T

    for module in ("model.layers.1.mlp.down_proj", "lm_head"):
        told = "model.unembed_tokens" if module == "lm_head" else module
        hook: Any = lambda _, inputs, y, told=told: y + added(told, inputs[0])  # noqa: E731
        model.get_submodule(module).register_forward_hook(hook)
    layer = model.get_submodule(LINEAR)
    if name == "qwen3.5":

        def joined(_: Any, inputs: Any, y: torch.Tensor) -> torch.Tensor:
            parts = y.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
            new = [t + added(f"{LINEAR}.in_proj_{p}", inputs[0]) for p, t in zip("qkv", parts, strict=True)]
            return torch.cat(new, dim=-1)

        layer.in_proj_qkv.register_forward_hook(joined)
    else:
        original = layer.fix_query_key_value_ordering
        layer.in_proj_qkvz.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))

        def apart(*mixed: torch.Tensor) -> Any:
            found = zip("qkvzba", original(*mixed), strict=True)
            return [t + added(f"{LINEAR}.in_proj_{p}", seen["x"]).view(t.shape) for p, t in found]

        layer.fix_query_key_value_ordering = apart
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("name", MODELS)
def test_split_projection_merge_equals_separate_parts(tmp_path: Path, name: str) -> None:
    base, values = model_base(tmp_path / "base", name), trained(name)
    merge(base, [AdapterChoice(save(tmp_path / "adapter", values))], tmp_path / "out")
    exact, cls = unmerged(base, name, values), MODELS[name][0]
    with torch.no_grad():
        before, after = (
            cls.from_pretrained(f, dtype=torch.float32).eval()(token_ids()).logits for f in (base, tmp_path / "out")
        )
    assert (exact - before).abs().max() > 0.1
    torch.testing.assert_close(after, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_validate_split_projection_compares_parts(tmp_path: Path, name: str) -> None:
    base, values = model_base(tmp_path / "base", name), trained(name)
    choice = [AdapterChoice(save(tmp_path / "adapter", values))]
    merge(base, choice, tmp_path / "out")
    values[f"{LINEAR}.in_proj_k.lora_B"][3] += 0.1
    merge(base, [AdapterChoice(save(tmp_path / "other", values))], tmp_path / "wrong")
    options = ValidationOptions()
    assert validate(base, choice, tmp_path / "out", options=options, progress=Silent()).passed
    assert not validate(base, choice, tmp_path / "wrong", options=options, progress=Silent()).passed


@pytest.mark.parametrize("size", [{"linear_num_key_heads": 4}, {"linear_key_head_dim": "12"}])
def test_split_projection_wrong_sizes_are_refused(tmp_path: Path, size: dict[str, Any]) -> None:
    base = model_base(tmp_path / "base", "qwen3.5")
    edit_json(base / "config.json", **size)
    with pytest.raises(AdapterError, match="that part of"):
        merge(base, [AdapterChoice(save(tmp_path / "adapter", trained("qwen3.5")))], tmp_path / "out")
