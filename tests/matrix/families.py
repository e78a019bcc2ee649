"""Tiny models of the families that adapters are trained on, and one forward for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.builders import VOCABULARY, bert_config, gpt2_config, llama_config, randomize

TEXT: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = TEXT | {"num_experts_per_tok": 2}


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(9))}


def pixels() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator)}


def video() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {"pixel_values": torch.randn(1, 4, 3, 16, 16, dtype=torch.float64, generator=generator)}


def wave() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {"input_values": torch.randn(2, 64, dtype=torch.float64, generator=generator)}


def speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    mel = torch.randn(2, 8, 32, dtype=torch.float64, generator=generator)
    return {"input_features": mel, "decoder_input_ids": tokens()["input_ids"]}


def pairs() -> dict[str, torch.Tensor]:
    return tokens() | {"decoder_input_ids": tokens()["input_ids"][:, :5]}


@dataclass(frozen=True)
class Family:
    """linear, embedding, convolution, norm: the names of such modules, None where there is none.

    feedforward: linear modules whose IA3 scales the input; experts: fused parameters.
    """

    model: type
    config: Callable[[], Any]
    linear: tuple[str, ...]
    feedforward: tuple[str, ...] = ()
    embedding: str | None = None
    convolution: str | None = None
    norm: str | None = None
    head: str | None = None
    experts: tuple[str, ...] = ()
    conv1d: bool = False
    biases: bool = False
    layers: bool = False  # layer_replication is possible
    inputs: Callable[[], dict[str, torch.Tensor]] = tokens
    settings: dict[str, Any] = field(default_factory=dict)

    def load(self, folder: Path) -> Any:
        return self.model.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[attr-defined]

    def save(self, folder: Path) -> Path:
        model = self.model(self.config())
        randomize(model, 1)
        model.save_pretrained(folder)
        return folder

    @torch.no_grad()
    def answer(self, model: Any) -> torch.Tensor:
        """Logits, or the last hidden state, in float64."""
        body: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        body.set_experts_implementation("eager")  # the grouped kernels know no float64
        model = model.double()
        for module in model.modules():
            if type(module).__module__ == "peft.tuners.adamss.layer" and hasattr(module, "dtype"):
                module.dtype = torch.float64  # it casts its input to the type that the base had at first
        out = model(**self.inputs())
        value = out.get("logits")
        return value if value is not None else out.last_hidden_state


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
FUSED = ("experts.gate_up_proj", "experts.down_proj")


def _llama(tied: bool = False) -> Any:
    return llama_config(tied, attention_bias=True, mlp_bias=True)


def _gemma() -> Any:
    return transformers.GemmaConfig(intermediate_size=80, head_dim=12, **TEXT)


def _gemma3() -> Any:
    return transformers.Gemma3TextConfig(intermediate_size=80, head_dim=12, sliding_window=8, **TEXT)


def _gpt_oss() -> Any:
    return transformers.GptOssConfig(
        intermediate_size=48, num_local_experts=4, head_dim=16, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **MOE,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "llama": Family(
        transformers.LlamaForCausalLM, _llama, GATED, ("down_proj",), "embed_tokens", norm="input_layernorm",
        head="lm_head", biases=True, layers=True,
    ),
    "llama tied": Family(
        transformers.LlamaForCausalLM, lambda: _llama(True), GATED, ("down_proj",), "embed_tokens", norm="norm",
        head="lm_head", biases=True,
    ),
    "qwen2": Family(
        transformers.Qwen2ForCausalLM, lambda: transformers.Qwen2Config(intermediate_size=80, **TEXT), GATED,
        ("down_proj",), "embed_tokens", norm="post_attention_layernorm", head="lm_head", biases=True, layers=True,
    ),
    "gemma": Family(
        transformers.GemmaForCausalLM, _gemma, GATED, ("down_proj",), "embed_tokens", norm="norm", head="lm_head",
    ),
    "gemma3": Family(
        transformers.Gemma3ForCausalLM, _gemma3, GATED, ("down_proj",), "embed_tokens", norm="q_norm",
        head="lm_head",
    ),
    "phi": Family(
        transformers.PhiForCausalLM, lambda: transformers.PhiConfig(intermediate_size=80, **TEXT),
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), ("fc2",), "embed_tokens", norm="final_layernorm",
        head="lm_head", biases=True,
    ),
    "gpt2": Family(
        transformers.GPT2LMHeadModel, gpt2_config, ("c_attn", "c_proj", "c_fc"), ("mlp.c_proj",), "wte",
        norm="ln_1", head="lm_head", conv1d=True, biases=True, settings={"fan_in_fan_out": True},
    ),
    "gpt neox": Family(
        transformers.GPTNeoXForCausalLM,
        lambda: transformers.GPTNeoXConfig(
            intermediate_size=80, **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
        ),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), ("dense_4h_to_h",), "embed_in",
        norm="input_layernorm", head="embed_out", biases=True,
    ),
    "bert": Family(
        transformers.BertForSequenceClassification, bert_config, ("query", "key", "value", "dense"),
        ("output.dense",), "word_embeddings", norm="LayerNorm", head="classifier", biases=True,
    ),
    "roberta": Family(
        transformers.RobertaModel,
        lambda: transformers.RobertaConfig(**bert_config().to_diff_dict() | {"model_type": "roberta"}),
        ("query", "value", "dense"), ("output.dense",), "word_embeddings", norm="LayerNorm", biases=True,
    ),
    "t5": Family(
        transformers.T5ForConditionalGeneration,
        lambda: transformers.T5Config(
            d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
        ),
        ("q", "k", "v", "o", "wi", "wo"), ("wo",), norm="layer_norm", inputs=pairs,
    ),
    "whisper": Family(
        transformers.WhisperForConditionalGeneration,
        lambda: transformers.WhisperConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=44, decoder_ffn_dim=44, vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=16,
            max_target_positions=16, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        ("q_proj", "v_proj", "fc1", "fc2"), ("fc2",), convolution="conv2", norm="final_layer_norm", biases=True,
        inputs=speech,
    ),
    "vit": Family(
        transformers.ViTForImageClassification,
        lambda: transformers.ViTConfig(
            hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=16,
            patch_size=4, num_labels=3,
        ),
        ("q_proj", "v_proj", "o_proj", "fc1", "fc2"), ("fc2",), convolution="projection", norm="layernorm_before",
        head="classifier", biases=True, inputs=pixels,
    ),
    "resnet": Family(
        transformers.ResNetForImageClassification,
        lambda: transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[12, 20], depths=[1, 2], layer_type="basic", num_labels=3
        ),
        (), convolution="convolution", head="classifier.1", inputs=pixels,
    ),
    "regnet": Family(  # convolutions in groups
        transformers.RegNetForImageClassification,
        lambda: transformers.RegNetConfig(
            embedding_size=8, hidden_sizes=[12, 24], depths=[1, 1], groups_width=6, layer_type="x", num_labels=3
        ),
        (), convolution="layer.1.convolution", head="classifier.1", inputs=pixels,
    ),
    "wav2vec2": Family(
        transformers.Wav2Vec2Model,
        lambda: transformers.Wav2Vec2Config(
            hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=4, conv_dim=(8, 12),
            conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer", mask_time_prob=0.0,
        ),
        ("q_proj", "v_proj", "out_proj", "intermediate_dense"), ("intermediate_dense",),
        convolution="conv_layers.1.conv", norm="final_layer_norm", biases=True, inputs=wave,
    ),
    "videomae": Family(
        transformers.VideoMAEModel,
        lambda: transformers.VideoMAEConfig(
            hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, image_size=16,
            patch_size=8, num_frames=4, use_mean_pooling=False,
        ),
        ("query", "value", "dense"), ("output.dense",), convolution="projection", inputs=video,
    ),
    "mixtral": Family(
        transformers.MixtralForCausalLM,
        lambda: transformers.MixtralConfig(intermediate_size=40, num_local_experts=4, **MOE),
        ATTENTION, (), "embed_tokens", norm="input_layernorm", head="lm_head", experts=FUSED,
    ),
    "qwen2 moe": Family(
        transformers.Qwen2MoeForCausalLM,
        lambda: transformers.Qwen2MoeConfig(
            intermediate_size=40, moe_intermediate_size=28, shared_expert_intermediate_size=36, num_experts=5, **MOE
        ),
        ATTENTION, (), "embed_tokens", norm="input_layernorm", head="lm_head", experts=FUSED,
    ),
    "qwen3 moe": Family(
        transformers.Qwen3MoeForCausalLM,
        lambda: transformers.Qwen3MoeConfig(
            intermediate_size=40, moe_intermediate_size=28, num_experts=5, head_dim=12, **MOE
        ),
        ATTENTION, (), "embed_tokens", norm="q_norm", head="lm_head", experts=FUSED,
    ),
    "gpt oss": Family(
        transformers.GptOssForCausalLM, _gpt_oss, ATTENTION, (), "embed_tokens", norm="input_layernorm",
        head="lm_head", experts=FUSED,
    ),
}  # fmt: skip
