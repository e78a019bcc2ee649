"""A tiny base and one adapter of every kind on it, made by hand: (configuration, tensors)."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.builders import handmade_base
from tests.fuzz import rare

BASE = {
    "model.embed_tokens.weight": (11, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.mlp.up_proj.bias": (6,),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.layers.0.conv.weight": (6, 4, 3, 3),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 8, 4),
    "model.layers.0.mlp.experts.0.w1.weight": (6, 4),
    "model.layers.0.mlp.experts.1.w1.weight": (6, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (11, 4),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 11, "max_position_embeddings": 16,
    "torch_dtype": "float32",
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj"
CONV = "model.layers.0.conv"
EXPERTS = "model.layers.0.mlp.experts"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": ["up_proj"], "bias": "none"}
LYCORIS = {"r": 2, "alpha": 5, "target_modules": ["up_proj"]}
PAIR = {f"{UP}.lora_A.weight": (2, 4), f"{UP}.lora_B.weight": (6, 2)}
OFT = {
    "peft_type": "OFT", "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": True, "eps": 6e-5,
    "block_share": False, "peft_version": "0.21.0",
}  # fmt: skip

KINDS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "lora": (LORA | {"rank_pattern": {"x": 3}, "alpha_pattern": {"x": 3}, "use_rslora": True}, PAIR),
    "lora bias": (LORA | {"lora_bias": True}, PAIR | {f"{UP}.lora_B.bias": (6,)}),
    "lora convolution": (
        LORA,
        {f"{CONV}.lora_A.weight": (2, 4, 3, 3), f"{CONV}.lora_B.weight": (6, 2, 1, 1)},
    ),
    "lora embedding": (
        LORA,
        {"model.embed_tokens.lora_embedding_A": (2, 11), "model.embed_tokens.lora_embedding_B": (4, 2)},
    ),
    "pissa": (LORA | {"init_lora_weights": "pissa"}, PAIR),
    "saved": (
        LORA | {"modules_to_save": ["norm", "lm_head"], "bias": "all"},
        PAIR | {"model.norm.weight": (4,), "lm_head.weight": (11, 4), f"{UP}.bias": (6,)},
    ),
    "tokens": (
        LORA | {"trainable_token_indices": {"embed_tokens": [1, 3]}},
        PAIR | {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 4)},
    ),
    "experts": (
        LORA | {"target_parameters": ["experts.gate_up_proj"], "peft_version": "0.21.0"},
        {f"{EXPERTS}.lora_A.weight": (6, 4), f"{EXPERTS}.lora_B.weight": (8, 6)},
    ),
    "stacked": (LORA, {f"{EXPERTS}.w1.lora_A": (2, 2, 4), f"{EXPERTS}.w1.lora_B": (2, 6, 2)}),
    "one expert": (LORA, {f"{EXPERTS}.1.up_proj.lora_A": (2, 4), f"{EXPERTS}.1.up_proj.lora_B": (4, 2)}),
    "replicated": (
        LORA | {"layer_replication": [[0, 2], [0, 2]]},
        {"model.layers.3.mlp.up_proj.lora_A.weight": (2, 4), "model.layers.3.mlp.up_proj.lora_B.weight": (6, 2)},
    ),
    "dora": (LORA | {"use_dora": True}, PAIR | {f"{UP}.lora_magnitude_vector": (6,)}),
    "adalora": (
        LORA | {"peft_type": "ADALORA", "init_r": 3, "rank_pattern": {f"{UP}.lora_E": [True, False, True]}},
        {f"{UP}.lora_A": (2, 4), f"{UP}.lora_B": (6, 2), f"{UP}.lora_E": (2, 1)},
    ),
    "ia3": (
        {"peft_type": "IA3", "feedforward_modules": ["down_proj"], "target_modules": ["up_proj"]},
        {f"{UP}.ia3_l": (6, 1), f"{CONV}.ia3_l": (1, 6, 1, 1)},
    ),
    "ia3 feedforward": (
        {"peft_type": "IA3", "feedforward_modules": r".*(up_proj|conv)", "target_modules": ["up_proj"]},
        {f"{UP}.ia3_l": (1, 4), f"{CONV}.ia3_l": (1, 4, 1, 1)},
    ),
    "loha": (
        LYCORIS | {"peft_type": "LOHA"},
        {
            f"{UP}.hada_w1_a": (6, 2), f"{UP}.hada_w1_b": (2, 4),
            f"{UP}.hada_w2_a": (6, 2), f"{UP}.hada_w2_b": (2, 4),
            f"{CONV}.hada_t1": (2, 2, 3, 3), f"{CONV}.hada_w1_a": (2, 6), f"{CONV}.hada_w1_b": (2, 4),
            f"{CONV}.hada_t2": (2, 2, 3, 3), f"{CONV}.hada_w2_a": (2, 6), f"{CONV}.hada_w2_b": (2, 4),
        },
    ),
    "lokr": (
        LYCORIS | {"peft_type": "LOKR", "alpha_pattern": {"conv": 3}},
        {
            f"{UP}.lokr_w1": (2, 2), f"{UP}.lokr_w2_a": (3, 2), f"{UP}.lokr_w2_b": (2, 2),
            f"{CONV}.lokr_w1_a": (2, 2), f"{CONV}.lokr_w1_b": (2, 2),
            f"{CONV}.lokr_t2": (2, 2, 3, 3), f"{CONV}.lokr_w2_a": (2, 3), f"{CONV}.lokr_w2_b": (2, 2),
        },
    ),
    "vera": (
        {"peft_type": "VERA", "r": 3, "save_projection": True, "projection_prng_key": 0},
        {"vera_A": (3, 4), "vera_B": (6, 3), f"{UP}.vera_lambda_b": (6,), f"{UP}.vera_lambda_d": (3,)},
    ),
    "vera drawn": (
        {"peft_type": "VERA", "r": 3, "save_projection": False, "projection_prng_key": 0},
        {f"{UP}.vera_lambda_b": (6,), f"{UP}.vera_lambda_d": (3,)},
    ),
    "oft": (OFT, {f"{UP}.oft_R.weight": (2, 1), "model.embed_tokens.oft_embedding_R": (1, 6)}),
    "oft shared": (OFT | {"use_cayley_neumann": False, "block_share": True}, {f"{UP}.oft_R.weight": (1, 1)}),
    "boft": (
        {"peft_type": "BOFT", "boft_n_butterfly_factor": 2, "boft_block_size": 2},
        {f"{UP}.boft_R": (2, 2, 2, 2), f"{UP}.boft_s": (6, 1)},
    ),
}  # fmt: skip
KINDS |= rare.KINDS
KEYS = (
    *sorted({key for config, _ in KINDS.values() for key in config}),
    "target_parameters", "alora_invocation_tokens", "enable_lora", "fan_in_fan_out", "ensure_weight_tying",
    "swift_type", "auto_mapping", "token_indices", "unsloth_fused_expert_lora", "lora_B_layout", "revision",
    "base_model_name_or_path", "trainable_token_indices", "layer_replication", "up_proj", "embed_tokens", UP,
    "conv",
)  # fmt: skip
WORDS = (
    "base_model", "model", "layers", "0", "1", "2", "embed_tokens", "mlp", "up_proj", "conv", "experts", "w1", "w2",
    "gate_up_proj", "gate_up_projs", "weight", "bias", "default", "lora_A", "lora_B", "lora_E", "lora_embedding_A",
    "lora_embedding_B", "lora_magnitude_vector", "ia3_l", "hada_w1_a", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w2_a",
    "lokr_t2", "vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d", "oft_R", "oft_embedding_R", "boft_R", "boft_s",
    "trainable_tokens_delta", "token_adapter", "modules_to_save", "original_module", "base_layer", "lm_head",
    "norm", *rare.MARKERS,
)  # fmt: skip


def base(folder: Path) -> Path:
    return handmade_base(folder, BASE, **CONFIG)


def tensors(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"base_model.model.{n}": torch.randn(s, generator=generator) for n, s in KINDS[kind][1].items()}


def config_bytes(kind: str) -> bytes:
    return json.dumps(KINDS[kind][0]).encode()
