"""Tiny decoders of many families, with a LoRA each, in sizes that the attention kernels of runtimes take."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.consumers.models import TOKENS
from tests.packages.conftest import VOCABULARY, save_tokenizer

# Characters, as save_tokenizer numbers them.
PROMPTS: tuple[tuple[int, ...], ...] = (
    (1, 45, 60, 71, 80, 12, 33),
    (1, 99, 20, 20, 84),
    (1, 50, 51, 52, 53, 54, 55, 56),
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_HEAD = 32  # the smallest head size that vLLM's kernels for the CPU take
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 3, "initializer_range": 0.12,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.12,
}  # fmt: skip
_TIED = _GROUPED | {"tie_word_embeddings": True}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_WIDE = {"head_dim": _HEAD}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_experts": 4}


@dataclass(frozen=True)
class DecoderFamily:
    """model: a class of transformers; sizes: of its configuration; modules: those that get a LoRA; lora: further
    settings of it; rows: of the vocabulary that the adapter was trained with, if it is not the base's; quiet:
    whether the embeddings are made small, as a model that scales them would else repeat its last token."""

    model: str
    sizes: dict[str, Any]
    modules: tuple[str, ...]
    lora: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    quiet: bool = False

    def save(self, root: Path) -> None:
        """root/base with a tokenizer, and root/adapter."""
        made = getattr(transformers, self.model)
        torch.manual_seed(11)
        model = made(made.config_class(**self.sizes))
        if self.quiet:
            model.get_input_embeddings().weight.data *= 0.1
        model.save_pretrained(root / "base")
        save_tokenizer(root / "base")
        settings = {"r": 8, "lora_alpha": 12, "target_modules": list(self.modules), "task_type": "CAUSAL_LM"}
        tuned = peft.get_peft_model(self._load(root), peft.LoraConfig(**settings | self.lora))
        trained = ("lora_B", "modules_to_save", *(("embed_tokens.weight", "lm_head.weight") if self.rows else ()))
        for name, parameter in tuned.named_parameters():
            if any(part in name for part in trained):
                parameter.data += 0.1 * torch.randn_like(parameter)
        tuned.save_pretrained(root / "adapter", save_embedding_layers=bool(self.rows))

    def _load(self, root: Path) -> Any:
        model = getattr(transformers, self.model).from_pretrained(root / "base", dtype=torch.float32)
        if self.rows:
            model.resize_token_embeddings(self.rows, mean_resizing=False)
        return model.eval()

    @torch.no_grad()
    def answers(self, root: Path) -> list[list[int]]:
        """TOKENS greedy tokens of the unmerged model in fp32 behind each prompt; an end of the text ends nothing.

        AssertionError if the base gives the same, as nothing would be shown then.
        """
        tuned = peft.PeftModel.from_pretrained(self._load(root), root / "adapter").eval()
        said = [_continued(tuned, p) for p in PROMPTS]
        with tuned.disable_adapter():
            assert [_continued(tuned, p) for p in PROMPTS] != said
        return said


def _continued(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """By forward passes alone: generate() would leave out tokens that end a text."""
    ids = torch.tensor([prompt])
    for _ in range(TOKENS):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


DECODERS: dict[str, DecoderFamily] = {
    "Llama": DecoderFamily("LlamaForCausalLM", _GROUPED, GATED),
    "Llama, DoRA": DecoderFamily("LlamaForCausalLM", _GROUPED, GATED, {"use_dora": True}),
    "Llama, tied, its head trained": DecoderFamily(
        "LlamaForCausalLM", _TIED, GATED, {"modules_to_save": ["lm_head"]}
    ),
    "Llama, tokens added": DecoderFamily("LlamaForCausalLM", _GROUPED, GATED, rows=VOCABULARY + 5),
    "Llama, tied, tokens added": DecoderFamily("LlamaForCausalLM", _TIED, GATED, rows=VOCABULARY + 5),
    "Llama 3": DecoderFamily("LlamaForCausalLM", _GROUPED | {"rope_parameters": _LLAMA3}, GATED),
    "Qwen2": DecoderFamily("Qwen2ForCausalLM", _GROUPED, GATED),
    "Qwen3": DecoderFamily("Qwen3ForCausalLM", _GROUPED | _WIDE, GATED),
    "Mistral": DecoderFamily("MistralForCausalLM", _GROUPED, GATED),
    "Gemma 2": DecoderFamily("Gemma2ForCausalLM", _GROUPED | _WIDE, GATED, quiet=True),
    "Gemma 3": DecoderFamily("Gemma3ForCausalLM", _GROUPED | _WIDE, GATED, quiet=True),
    "Phi-3": DecoderFamily("Phi3ForCausalLM", _GROUPED, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "Phi": DecoderFamily("PhiForCausalLM", _SIZES, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "GPT-2": DecoderFamily("GPT2LMHeadModel", _GPT2, ("c_attn", "c_proj", "c_fc")),
    "GPT-NeoX": DecoderFamily("GPTNeoXForCausalLM", _SIZES, ("query_key_value", "dense", "dense_h_to_4h")),
    "OPT": DecoderFamily(
        "OPTForCausalLM", _SIZES | {"ffn_dim": 160, "word_embed_proj_dim": 128}, ("q_proj", "v_proj", "fc1", "fc2")
    ),
    "Falcon": DecoderFamily("FalconForCausalLM", _SIZES, ("query_key_value", "dense", "dense_4h_to_h")),
    "StableLM": DecoderFamily("StableLmForCausalLM", _GROUPED, GATED),
    "OLMo 2": DecoderFamily("Olmo2ForCausalLM", _GROUPED, GATED),
    "Granite": DecoderFamily("GraniteForCausalLM", _GROUPED, GATED),
    "StarCoder 2": DecoderFamily("Starcoder2ForCausalLM", _GROUPED, ("q_proj", "v_proj", "c_fc", "c_proj")),
    "Cohere": DecoderFamily("CohereForCausalLM", _GROUPED | {"logit_scale": 1.0}, GATED),
    "SmolLM3": DecoderFamily("SmolLM3ForCausalLM", _GROUPED, GATED),
    "Mixtral": DecoderFamily(
        "MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}, ATTENTION, {"target_parameters": _EXPERTS}
    ),
    "Qwen3-MoE": DecoderFamily(
        "Qwen3MoeForCausalLM", _GROUPED | _WIDE | _MOE, ATTENTION, {"target_parameters": _EXPERTS}
    ),
    "OLMoE": DecoderFamily(
        "OlmoeForCausalLM", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}, ATTENTION,
        {"target_parameters": _EXPERTS},
    ),
}  # fmt: skip
