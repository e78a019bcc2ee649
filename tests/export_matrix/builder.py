"""Decoders of the builder's list besides the plain ones: experts, convolutions, and what they are combined with."""

from typing import Any

from tests.onnx_export.architectures import Architecture
from tests.onnx_export.conftest import VOCABULARY

_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 112, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
_LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "conv_L_cache": 3}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
_GPT_OSS = {
    "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 96, "head_dim": 16,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0,
        "original_max_position_embeddings": 32, "truncate": False,
    },
}  # fmt: skip


def _of(prefix: str, *, scale: float = 0.15, **settings: Any) -> Architecture:
    merged = {**_PLAIN, **settings}
    return Architecture(f"{prefix}ForCausalLM", f"{prefix}Config", merged, ("q_proj", "v_proj"), scale=scale)


MODELS: dict[str, Architecture] = {
    "lfm2": _of("Lfm2", **_LFM2, block_auto_adjust_ff_dim=False),
    "lfm2-adjusted": _of("Lfm2", **_LFM2, block_auto_adjust_ff_dim=True, block_multiple_of=32),
    "lfm2-moe": _of("Lfm2Moe", **_LFM2, **_EXPERTS, num_dense_layers=1, use_expert_bias=True,
                    routed_scaling_factor=1.5, norm_topk_prob=True),
    "gpt-oss": _of("GptOss", **_GPT_OSS, layer_types=["sliding_attention", "full_attention"], sliding_window=24),
    "granite-4-dense": _of("GraniteMoeHybrid", layer_types=["attention", "attention"], num_local_experts=0,
                           num_experts_per_tok=0, shared_intermediate_size=112, position_embedding_type="rope",
                           embedding_multiplier=3.0, attention_multiplier=0.2, logits_scaling=4.0,
                           residual_multiplier=0.3),
}  # fmt: skip
