"""Every architecture that transformers has, made tiny: its own default configuration with small sizes."""

import dataclasses
import re
from typing import Any

from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto import modeling_auto

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "question": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "image text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "ctc": "MODEL_FOR_CTC_MAPPING",
}
MOST = 20_000_000  # parameters of what counts as tiny
VOCABULARY = 101

# The name of a setting → its small value; the first that matches decides. None: it stays as it is.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"(num_|n_)?(routed_experts|local_experts|experts)|moe_num_experts|num_experts", 4),
    (r"(num_|n_)?(experts_per_tok|experts_per_token)|moe_top_?k|top_k|moe_k|num_selects|router_top_k", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"num_kv_shared_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(text_|max_)?vocab_size|vocab_size_per_layer_input|vocab_size_or_config_json_file|n_vocab", VOCABULARY),
    (r"max_position_embeddings|n_positions|max_.*positions|n_ctx|max_seq_len(gth)?|context_length|seq_length", 128),
    (r".*(kv_heads|key_value_heads|num_kv|kv_n_heads|num_query_groups)", 2),
    (r".*(attention_heads|n_heads?|num_heads|nhead|n_attn_heads)", 4),
    (r"head_dim|attention_head_dim|d_kv|kv_channels|head_size|v_head_dim|attention_head_size|global_head_dim", 12),
    (r"kv_lora_rank|q_lora_rank|.*lora_rank", 16),
    (r"qk_rope_head_dim|index_head_dim", 8),
    (r"qk_nope_head_dim", 8),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|projection_dim|embedding_size|model_dim|width)", 48),
    (r"dim|emb_dim|proj_dim|output_dim|n_embed|d_embed", 48),
    (r".*(intermediate_size|intermediate_dim|ffn_dim|d_ff|n_inner|ffn_hidden_size|d_inner|feed_forward\w*)", 80),
    (r".*(num_hidden_layers|num_layers|n_layers?|_layers|num_blocks|depth)", 2),
    (r"image_size|input_size", 16),
    (r"patch_size", 4),
    (r"num_mel_bins", 8),
    (r"sliding_window|attention_window|local_attention", 16),
    (r"num_labels", 3),
)
_TOKENS = re.compile(r".*(token_id|token_index|_id|_index|_idx|token)")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """task: a key of TASKS; type: the model_type; name: the class of transformers."""

    task: str
    type: str
    name: str

    def __str__(self) -> str:
        return f"{self.task} {self.type}"


def architectures() -> list[Architecture]:
    """Every pair of a task and a type of model that transformers has a class for."""
    found = []
    for task, mapping in TASKS.items():
        for kind, names in getattr(modeling_auto, f"{mapping}_NAMES").items():
            first = names if isinstance(names, str) else names[0]
            found.append(Architecture(task, kind, first))
    return found


HYBRID: dict[str, Any] = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]}
# What an architecture needs besides; a part of another configuration goes by its own type.
SPECIAL: dict[str, dict[str, Any]] = {
    "bit": {"embedding_size": 64, "hidden_sizes": [64, 128, 128, 128], "depths": [1, 1, 1, 1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "convnext": {"hidden_sizes": [12, 16, 20, 24], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [12, 16, 20, 24], "depths": [1, 1, 1, 1]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.2, "depth_coefficient": 0.2},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 32, "pad_token_id": 1},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 12},
    "hunyuan_v1_moe": {"head_dim": 12},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 12},
    "mobilebert": {"embedding_size": 32},
    "nemotron": {"head_dim": 12, "num_key_value_heads": 2},
    "perceiver": {"num_latents": 8, "d_latents": 48, "num_self_attends_per_block": 2, "qk_channels": 48},
    "reformer": {"is_decoder": True},
    "regnet": {"embedding_size": 8, "hidden_sizes": [12, 24], "depths": [1, 1], "groups_width": 6},
    "resnet": {"embedding_size": 8, "hidden_sizes": [12, 20], "depths": [1, 2], "layer_type": "basic"},
    "zamba": {**HYBRID, "attention_head_dim": 24, "mamba_dt_rank": 4},
    "zamba2": {**HYBRID, "adapter_rank": 4, "mamba_headdim": 12, "n_mamba_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"hidden_size_per_layer_input": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def small(config_class: Any) -> Any:
    """The configuration with small sizes, and those of its parts."""
    settings: dict[str, Any] = {}
    default = config_class()
    parts = getattr(config_class, "sub_configs", {}) or {}
    for name in parts:
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            settings[name] = small(type(part)).to_dict()
    for field in dataclasses.fields(config_class):
        if not field.init or field.name in parts:
            continue
        try:
            value = getattr(default, field.name, None)
        except AmbiguousGlobalPerLayerAttributeError:
            value = field.default
        size = _size(field.name, value)
        if size is not None:
            settings[field.name] = size
    return config_class(**settings | SPECIAL.get(str(config_class.model_type), {}))


def _size(name: str, value: Any) -> Any:
    """The small value of a setting; None where it stays as it is."""
    if isinstance(value, bool) or not isinstance(value, int) or name == "chunk_size_feed_forward":
        return None
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return size
    return 3 + value % (VOCABULARY - 4) if _TOKENS.fullmatch(name) and value >= VOCABULARY else None
