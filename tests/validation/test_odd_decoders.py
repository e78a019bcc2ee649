"""Decoders that keep no KV cache, end in several ways, read more than they say, or do not run at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_export.contracts import AdapterChoice
from lora_export.errors import InputError
from lora_export.merging import merge
from lora_export.validation.comparing.decoder import greedy
from lora_export.validation.kinds.texts import vocabulary
from tests.builders import VOCABULARY, llama_config, randomize
from tests.daily import daily
from tests.validation.conftest import judged

V = {"vocab_size": VOCABULARY}
MODELS: dict[str, tuple[Any, Callable[[], Any], list[str]]] = {
    "mamba": (
        transformers.MambaForCausalLM,
        lambda: transformers.MambaConfig(**V, hidden_size=48, num_hidden_layers=2, state_size=8, time_step_rank=6),
        ["in_proj", "x_proj"],
    ),
    "falcon mamba": (
        transformers.FalconMambaForCausalLM,
        lambda: transformers.FalconMambaConfig(
            **V, hidden_size=48, num_hidden_layers=2, state_size=8, time_step_rank=6
        ),
        ["in_proj", "x_proj"],
    ),
    "rwkv": (
        transformers.RwkvForCausalLM,
        lambda: transformers.RwkvConfig(
            **V, hidden_size=48, num_hidden_layers=2, attention_hidden_size=48, intermediate_size=80
        ),
        ["key", "value"],
    ),
    "recurrent gemma": (
        transformers.RecurrentGemmaForCausalLM,
        lambda: transformers.RecurrentGemmaConfig(
            **V, hidden_size=48, lru_width=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4
        ),
        ["linear_x", "q_proj"],
    ),
    "xlnet": (
        transformers.XLNetLMHeadModel,
        lambda: transformers.XLNetConfig(**V, d_model=48, n_layer=2, n_head=4, d_inner=80),
        ["layer_1"],
    ),
    "xlm": (
        transformers.XLMWithLMHeadModel,
        lambda: transformers.XLMConfig(**V, emb_dim=48, n_layers=2, n_heads=4, bos_index=0, eos_index=1),
        ["q_lin", "v_lin"],
    ),
    "gpt": (
        transformers.OpenAIGPTLMHeadModel,
        lambda: transformers.OpenAIGPTConfig(**V, n_embd=48, n_layer=2, n_head=4, n_positions=90),
        ["c_attn"],
    ),
    "several ends": (
        transformers.LlamaForCausalLM,
        lambda: llama_config(eos_token_id=[2, 5]),
        ["q_proj", "v_proj"],
    ),
}  # fmt: skip


def merged(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """(base, adapter, an honest merge), without a tokenizer."""
    cls, config, targets = MODELS[name]
    base, adapter, output = (folder / n for n in ("base", "adapter", "merged"))
    model = cls(config())
    randomize(model, 1, scale=0.15)
    model.save_pretrained(base)
    settings = {"fan_in_fan_out": True} if name == "gpt" else {}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    randomize(tuned, 2, tuple(n for n, p in tuned.named_parameters() if p.requires_grad), 0.1)
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    merge(base, [AdapterChoice(adapter)], output)
    return base, adapter, output


@pytest.mark.parametrize("name", daily(MODELS, ("gpt", "several ends")))
def test_validate_decoder_without_a_kv_cache_passes_and_a_fault_fails(tmp_path: Path, name: str) -> None:
    base, adapter, output = merged(name, tmp_path)
    result = judged(base, adapter, output, seed=3)
    assert result.passed, [c for c in result.checks if not c.passed]
    assert result.samples
    merge(base, [], tmp_path / "without")
    assert not judged(base, adapter, tmp_path / "without", seed=3).passed


@pytest.mark.parametrize("name", ["several ends", "mamba"])
def test_greedy_with_and_without_a_cache_says_the_same(name: str) -> None:
    """The token of each step is the likeliest after all before it."""
    cls, config, _ = MODELS[name]
    model = cls(config()).eval()
    randomize(model, 1, scale=0.15)
    found = greedy(model, torch.tensor([3, 7, 11]), 9)
    wanted = [3, 7, 11]
    with torch.no_grad():
        for _ in range(9):
            wanted.append(int(model(input_ids=torch.tensor([wanted])).logits[0, -1].argmax()))
    assert found.tolist() == wanted[3:]


def test_vocabulary_is_what_is_read_and_predicted() -> None:
    """Mllama reads eight tokens more than it predicts."""
    model = transformers.LlamaForCausalLM(llama_config())
    model.model.embed_tokens = torch.nn.Embedding(VOCABULARY + 8, 48)
    assert vocabulary(model) == VOCABULARY


def test_validate_of_a_reference_that_does_not_run_says_so(tmp_path: Path) -> None:
    """PEFT takes Llama 4's router for a linear layer; it gives two tensors, and PEFT's forward fails on them."""
    config = transformers.Llama4TextConfig(
        **V, hidden_size=48, intermediate_size=40, intermediate_size_mlp=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, num_local_experts=4, pad_token_id=0,
        attention_chunk_size=16, max_position_embeddings=128,
    )  # fmt: skip
    base, adapter, output = (tmp_path / n for n in ("base", "adapter", "merged"))
    model = transformers.Llama4ForCausalLM(config)
    randomize(model, 1, scale=0.15)
    model.save_pretrained(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["router"]))
    randomize(tuned, 2, ("lora_",), 0.1)
    tuned.save_pretrained(adapter)
    merge(base, [AdapterChoice(adapter)], output)
    with pytest.raises(InputError, match="the unmerged model does not run here") as told:
        judged(base, adapter, output, seed=3)
    assert "Llama4ForCausalLM ends with" in told.value.found
    assert "lora-export verify" in str(told.value.next_step)
