"""One small model with random weights an architecture: what every engine has to export."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.onnx_export.conftest import VOCABULARY, save_tokenizer

_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 112, "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
# The runtime that the builder writes for hears thirty seconds, and nothing shorter.
_WHISPER = {**_SEQ2SEQ, "num_mel_bins": 80, "max_source_positions": 1500, "max_target_positions": 64}
_AUDIO = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 112, "conv_dim": (32, 32, 32), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """cls, config: names in transformers; targets: modules that get a LoRA; attention: operators of the fused graph
    that are attention, None where the family has an attention of its own."""

    cls: str
    config: str
    settings: Mapping[str, Any]
    targets: tuple[str, ...]
    attention: int | None = 2
    scale: float = 0.15
    extra: Callable[[Any], None] = field(default=lambda model: None)


def _text(prefix: str, head: str, targets: tuple[str, ...] = ("query", "value"), **more: Any) -> Architecture:
    attention = more.pop("attention", 2)
    return Architecture(prefix + head, prefix + "Config", {**_BERT, **more}, targets, attention)


def _genai(
    prefix: str, config: str = "", targets: tuple[str, ...] = ("q_proj", "v_proj"), **more: Any
) -> Architecture:
    scale = more.pop("scale", 0.15)
    return Architecture(
        f"{prefix}ForCausalLM", config or f"{prefix}Config", {**_LLAMA, **more}, targets, scale=scale
    )


_QV = ("q_proj", "v_proj")


def _judge(prefix: str, head: str, targets: tuple[str, ...] = _QV, **more: Any) -> Architecture:
    """A decoder whose text a head judges; its attention is not fused."""
    settings = {**_LLAMA, "num_labels": 3, **more}
    return Architecture(f"{prefix}For{head}", f"{prefix}Config", settings, targets, None)


DYNAMO: dict[str, Architecture] = {
    a.cls: a
    for a in (
        _text("Bert", "Model"),
        _text("Bert", "ForMaskedLM"),
        _text("Bert", "ForSequenceClassification", num_labels=3),
        _text("Bert", "ForQuestionAnswering"),
        _text("Roberta", "ForTokenClassification", num_labels=5, pad_token_id=1),
        Architecture(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 112,
             "max_position_embeddings": 64},
            ("q_lin", "v_lin"),
        ),
        _text("MPNet", "Model", ("q", "v"), attention=None, pad_token_id=1),
        _text("Electra", "Model", embedding_size=32),
        _text("ModernBert", "ForMaskedLM", ("Wqkv", "Wo"), local_attention=8, global_attn_every_n_layers=2,
              pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        _text("DebertaV2", "ForSequenceClassification", ("query_proj", "value_proj"), attention=None,
              relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, share_att_key=True,
              norm_rel_ebd="layer_norm", position_biased_input=False),
        Architecture(
            "T5ForConditionalGeneration",
            "T5Config",
            {"vocab_size": VOCABULARY, "d_model": 64, "num_layers": 2, "d_ff": 112, "num_heads": 4, "d_kv": 16,
             "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
            ("q", "v", "wo"),
            10,
        ),
        Architecture("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ, ("q_proj", "v_proj", "fc1"), 10),
        Architecture("MarianMTModel", "MarianConfig", _SEQ2SEQ, _QV, 10),
        Architecture(
            "GPT2LMHeadModel",
            "GPT2Config",
            {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "bos_token_id": 1, "eos_token_id": 2},
            ("c_attn", "c_fc"),
        ),
        Architecture(
            "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_BERT, "bos_token_id": 1, "eos_token_id": 2},
            ("query_key_value", "dense_h_to_4h"),
        ),
        Architecture(
            "OPTForCausalLM",
            "OPTConfig",
            {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "ffn_dim": 112, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "bos_token_id": 1,
             "eos_token_id": 2, "pad_token_id": 3},
            ("q_proj", "fc1"),
        ),
        Architecture(
            "ViTForImageClassification", "ViTConfig", {**_VISION, "intermediate_size": 112, "num_labels": 7},
            _QV,
        ),
        _judge("Llama", "SequenceClassification"),
        _judge("Llama", "TokenClassification"),
        _judge("Qwen3", "SequenceClassification", head_dim=16),
        _judge("Qwen3", "TokenClassification", head_dim=16),
        _judge("Mistral", "SequenceClassification", sliding_window=8),
        _judge("Qwen2", "SequenceClassification"),
        _judge("Gemma", "TokenClassification", head_dim=16),
        _judge("Phi3", "SequenceClassification", targets=("qkv_proj",)),
        Architecture(
            "GPT2ForSequenceClassification",
            "GPT2Config",
            {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "num_labels": 3},
            ("c_attn", "c_fc"), None,
        ),
        Architecture("Dinov2Model", "Dinov2Config", {**_VISION, "mlp_ratio": 2}, _QV),
        Architecture(
            "CLIPModel",
            "CLIPConfig",
            {"text_config": {**_BERT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 3},
             "vision_config": {**_VISION, "intermediate_size": 112}, "projection_dim": 24},
            _QV,
            4,
        ),
        Architecture(
            "Wav2Vec2ForCTC", "Wav2Vec2Config",
            {**_AUDIO, "feat_extract_norm": "layer", "do_stable_layer_norm": True}, _QV,
        ),
    )
}  # fmt: skip
GENAI: dict[str, Architecture] = {
    a.cls: a
    for a in (
        _genai("Llama"),
        _genai("Mistral"),
        _genai("Qwen2"),
        _genai("Qwen3", head_dim=16),
        _genai("Gemma", head_dim=16),
        _genai("Gemma2", head_dim=16, sliding_window=16),
        _genai("Gemma3", "Gemma3TextConfig", head_dim=16, sliding_window=16),
        _genai("Phi", num_key_value_heads=4, partial_rotary_factor=0.5, hidden_size=128, scale=0.08),
        _genai("Phi3", targets=("qkv_proj", "gate_up_proj"), original_max_position_embeddings=64),
        _genai("SmolLM3"),
        _genai("Granite"),
        _genai("Olmo"),
        _genai("Nemotron", hidden_size=128, scale=0.08),
        _genai("Ernie4_5"),
        _genai("HunYuanDenseV1", head_dim=16),
        Architecture(
            "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, ("q_proj", "v_proj", "fc1"), None
        ),
    )
}


def build(architecture: Architecture) -> Any:
    """The model, seeded: weights large enough that every part of it matters to the outputs."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**architecture.settings)
    model = getattr(transformers, architecture.cls)(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, architecture.scale)
        elif name.endswith("weight"):
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):  # of which experts are chosen
            buffer.normal_(0, 0.1)
    return model.eval()


def save(architecture: Architecture, folder: Path) -> Path:
    build(architecture).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(architecture: Architecture, base: Path, folder: Path) -> Any:
    """A LoRA with numbers in both matrices; returns the unmerged model in fp32."""
    import peft
    import transformers

    torch.manual_seed(1)
    model = getattr(transformers, architecture.cls).from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(architecture.targets))
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.15)
    wrapped.save_pretrained(folder)
    return wrapped.get_base_model().eval()
