"""Tiny random models of every kind that validation knows, with the adapter task that each is trained for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.builders import VOCABULARY, bert_config, gpt2_config, llama_config, randomize
from tests.matrix.families import FAMILIES

BODY: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 80, "num_labels": 3,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "vocab_size": VOCABULARY,
    "max_position_embeddings": 80, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """kind: the module under validation/kinds; targets: what the adapter is trained on; victim: part of the name of
    a weight that tests spoil, as files have it; loaded: as the model has it, where that is another."""

    kind: str
    model: Any
    config: Callable[[], Any]
    targets: tuple[str, ...]
    victim: str
    task: str | None = None
    loaded: str = ""

    def save(self, folder: Path, dtype: torch.dtype) -> Path:
        model = self.model(self.config())
        randomize(model, 1, scale=0.15)
        model.to(dtype).save_pretrained(folder)
        return folder

    def train(self, base: Path, folder: Path, **changes: Any) -> Path:
        """An adapter "trained" on `base`: B, and whatever else its task trains, gets random values."""
        torch.manual_seed(5)
        model = self.model.from_pretrained(base, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": list(self.targets), "task_type": self.task}
        if self.model is transformers.GPT2LMHeadModel:
            settings["fan_in_fan_out"] = True
        tuned = peft.get_peft_model(model, peft.LoraConfig(**settings | changes))
        randomize(tuned, 2, tuple(n for n, p in tuned.named_parameters() if p.requires_grad), 0.1)
        tuned.save_pretrained(folder, save_embedding_layers=False)
        return folder


def _of(family: str, kind: str, *targets: str, victim: str, task: str | None = None, loaded: str = "") -> Tiny:
    known = FAMILIES[family]
    return Tiny(kind, known.model, known.config, targets, victim, task, loaded)


def _bert() -> Any:
    return bert_config()


def _clip() -> Any:
    text = {k: v for k, v in BODY.items() if k != "num_labels"} | {"projection_dim": 20, "eos_token_id": 2}
    vision = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 4, "projection_dim": 20,
    }  # fmt: skip
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)


def _modernbert() -> Any:
    return transformers.ModernBertConfig(
        **BODY, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        global_attn_every_n_layers=2, local_attention=8,
    )  # fmt: skip


def _deberta() -> Any:
    return transformers.DebertaV2Config(
        **BODY, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, type_vocab_size=0,
    )  # fmt: skip


def _whisper_classifier() -> Any:
    config = FAMILIES["whisper"].config()
    config.num_labels = 3
    return config


MODELS: dict[str, Tiny] = {
    "gpt2": Tiny(
        "decoder", transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(**gpt2_config().to_diff_dict() | {"n_positions": 160}),
        ("c_attn", "c_proj"), "h.1.attn.c_attn.weight", "CAUSAL_LM",
    ),
    "bert": Tiny("text", transformers.BertModel, _bert, ("query", "value"), "1.attention.self.value.weight",
                 "FEATURE_EXTRACTION"),
    "bert classes": Tiny("text", transformers.BertForSequenceClassification, _bert, ("query", "value"),
                         "1.attention.self.value.weight", "SEQ_CLS"),
    "bert tokens": Tiny("text", transformers.BertForTokenClassification, _bert, ("query", "value"),
                        "1.attention.self.value.weight", "TOKEN_CLS"),
    "roberta": Tiny(
        "text", transformers.RobertaForQuestionAnswering,
        lambda: transformers.RobertaConfig(
            **BODY | {"num_labels": 2}, pad_token_id=1, bos_token_id=0, eos_token_id=2
        ),
        ("query", "value"), "1.attention.self.value.weight", "QUESTION_ANS",
    ),
    "modernbert": Tiny("text", transformers.ModernBertModel, _modernbert, ("Wqkv", "Wo"), "1.attn.Wqkv.weight",
                       "FEATURE_EXTRACTION"),
    "deberta": Tiny("text", transformers.DebertaV2ForSequenceClassification, _deberta,
                    ("query_proj", "value_proj"), "1.attention.self.value_proj.weight", "SEQ_CLS"),
    "llama classes": Tiny("text", transformers.LlamaForSequenceClassification,
                          lambda: llama_config(pad_token_id=0, num_labels=3), ("q_proj", "v_proj"),
                          "1.self_attn.v_proj.weight", "SEQ_CLS"),
    "t5 encoder": Tiny("text", transformers.T5EncoderModel, FAMILIES["t5"].config, ("q", "v"),
                       "block.1.layer.0.SelfAttention.v.weight", "FEATURE_EXTRACTION"),
    "bart classes": Tiny("text", transformers.BartForSequenceClassification,
                         lambda: transformers.BartConfig(**SEQ2SEQ, num_labels=3), ("q_proj", "v_proj"),
                         "decoder.layers.1.self_attn.v_proj.weight", "SEQ_CLS"),
    "t5": _of("t5", "seq2seq", "q", "v", victim="decoder.block.1.layer.0.SelfAttention.v.weight",
              task="SEQ_2_SEQ_LM"),
    "bart": Tiny("seq2seq", transformers.BartForConditionalGeneration, lambda: transformers.BartConfig(**SEQ2SEQ),
                 ("q_proj", "v_proj"), "decoder.layers.1.self_attn.v_proj.weight", "SEQ_2_SEQ_LM"),
    "marian": Tiny("seq2seq", transformers.MarianMTModel, lambda: transformers.MarianConfig(**SEQ2SEQ),
                   ("q_proj", "v_proj"), "decoder.layers.1.self_attn.v_proj.weight", "SEQ_2_SEQ_LM"),
    "whisper": _of("whisper", "seq2seq", "q_proj", "v_proj", victim="decoder.layers.0.self_attn.v_proj.weight",
                   task="SEQ_2_SEQ_LM"),
    "vit": _of("vit", "vision", "q_proj", "v_proj", victim="layer.1.attention.attention.value.weight",
               loaded="layers.1.attention.v_proj.weight"),
    "resnet": _of("resnet", "vision", "convolution", victim="stages.1.layers.1.layer.0.convolution.weight"),
    "videomae": _of("videomae", "vision", "query", "value", victim="attention.value.weight"),
    "clip": Tiny("pair", transformers.CLIPModel, _clip, ("q_proj", "v_proj"),
                 "vision_model.encoder.layers.1.self_attn.v_proj.weight"),
    "wav2vec2": _of("wav2vec2", "audio", "q_proj", "v_proj", victim="v_proj.weight"),
    "wav2vec2 letters": Tiny(
        "audio", transformers.Wav2Vec2ForCTC,
        lambda: transformers.Wav2Vec2Config(**FAMILIES["wav2vec2"].config().to_diff_dict() | {"vocab_size": 30}),
        ("q_proj", "v_proj"), "v_proj.weight",
    ),
    "whisper classes": Tiny("audio", transformers.WhisperForAudioClassification, _whisper_classifier,
                            ("q_proj", "v_proj"), "encoder.layers.0.self_attn.v_proj.weight"),
}  # fmt: skip
