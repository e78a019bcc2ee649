"""Classifiers, taggers and their like, trained by PEFT on bases that are stored without the head."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as t

from tests.builders import bert_config, llama_config, lora, randomize, save_base

BERT = ["query", "value", "intermediate.dense"]
SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT: dict[str, Any] = SIZES | {"vocab_size": 101, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Case:
    """base: as what it is stored; trained: as what PEFT sees it; saved: modules; labels: of the new head."""

    base: type
    config: Callable[[], Any]
    trained: type
    saved: list[str]
    labels: int | None = None
    targets: list[str] = field(default_factory=lambda: BERT)
    task_type: str | None = None
    dtype: torch.dtype = torch.float32
    left_out: str | None = None  # the beginning of a name that the class has no use for


def bert() -> Any:
    config = bert_config()
    config.num_labels = 2
    return config


def roberta() -> Any:
    return t.RobertaConfig(**TEXT, type_vocab_size=1, pad_token_id=1)


def distilbert() -> Any:
    return t.DistilBertConfig(
        dim=48, hidden_dim=80, n_layers=2, n_heads=4, vocab_size=101, max_position_embeddings=64
    )


def vit(**changes: Any) -> Any:
    return t.ViTConfig(**SIZES, image_size=16, patch_size=8, **changes)


def wav2vec2() -> Any:
    return t.Wav2Vec2Config(
        **SIZES, vocab_size=32, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
        num_feat_extract_layers=2, classifier_proj_size=24, codevector_dim=16, proj_codevector_dim=16,
        num_codevectors_per_group=4, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip


def whisper() -> Any:
    return t.WhisperConfig(
        vocab_size=101, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, num_mel_bins=8,
        max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, classifier_proj_size=24,
    )  # fmt: skip


def bart() -> Any:
    return t.BartConfig(
        vocab_size=101, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=64,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip


def t5() -> Any:
    return t.T5Config(
        vocab_size=101, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip


def segformer() -> Any:
    return t.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=16, num_attention_heads=[1, 2, 2, 4]
    )


def qwen() -> Any:
    return t.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0)


def deberta() -> Any:
    return t.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0)


def modernbert() -> Any:
    return t.ModernBertConfig(
        **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )


def ast() -> Any:
    return t.ASTConfig(**SIZES, patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8)


LLAMA = ["q_proj", "down_proj"]
CASES: dict[str, Case] = {
    "bert tagger on the body": Case(t.BertModel, bert, t.BertForTokenClassification, ["classifier"], 5,
                                    task_type="TOKEN_CLS", left_out="pooler."),
    "bert tagger on a masked model": Case(t.BertForMaskedLM, bert, t.BertForTokenClassification, ["classifier"], 5,
                                          task_type="TOKEN_CLS", left_out="cls."),
    "bert questions": Case(t.BertForMaskedLM, bert, t.BertForQuestionAnswering, ["qa_outputs"],
                           task_type="QUESTION_ANS", left_out="cls."),
    "bert cross-encoder": Case(t.BertModel, bert, t.BertForSequenceClassification, ["classifier"], 1,
                               task_type="SEQ_CLS"),
    "bert classifier on pre-training": Case(t.BertForPreTraining, bert, t.BertForSequenceClassification,
                                            ["classifier"], 4, task_type="SEQ_CLS", left_out="cls."),
    "bert classifier with its pooler": Case(t.BertForMaskedLM, bert, t.BertForSequenceClassification,
                                            ["pooler", "classifier"], 4, task_type="SEQ_CLS"),
    "roberta": Case(t.RobertaForMaskedLM, roberta, t.RobertaForSequenceClassification, ["classifier"], 3,
                    task_type="SEQ_CLS", left_out="lm_head."),
    "xlm-roberta in bfloat16": Case(t.XLMRobertaForMaskedLM, lambda: t.XLMRobertaConfig(**TEXT, pad_token_id=1),
                                    t.XLMRobertaForTokenClassification, ["classifier"], 9, task_type="TOKEN_CLS",
                                    dtype=torch.bfloat16),
    "distilbert": Case(t.DistilBertForMaskedLM, distilbert, t.DistilBertForSequenceClassification,
                       ["pre_classifier", "classifier"], 3, ["q_lin", "ffn.lin1"], "SEQ_CLS", left_out="vocab_"),
    "deberta": Case(t.DebertaV2Model, deberta, t.DebertaV2ForSequenceClassification, ["pooler", "classifier"], 3,
                    ["query_proj"], "SEQ_CLS"),
    "electra": Case(t.ElectraForPreTraining, lambda: t.ElectraConfig(**TEXT, embedding_size=24),
                    t.ElectraForTokenClassification, ["classifier"], 3, task_type="TOKEN_CLS",
                    left_out="discriminator_predictions."),
    "modernbert": Case(t.ModernBertForMaskedLM, modernbert, t.ModernBertForSequenceClassification,
                       ["head", "classifier"], 3, ["Wqkv"], "SEQ_CLS", left_out="decoder."),
    "llama reward model": Case(t.LlamaForCausalLM, lambda: llama_config(pad_token_id=0),
                               t.LlamaForSequenceClassification, ["score"], 1, LLAMA, "SEQ_CLS",
                               left_out="lm_head."),
    "llama tagger on the body": Case(t.LlamaModel, llama_config, t.LlamaForTokenClassification, ["score"], 6,
                                     LLAMA, "TOKEN_CLS"),
    "qwen with a tied head": Case(t.Qwen2ForCausalLM, qwen, t.Qwen2ForSequenceClassification, ["score"], 3, LLAMA,
                                  "SEQ_CLS"),
    "gpt2": Case(t.GPT2LMHeadModel, lambda: t.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=101,
                                                         n_positions=64, pad_token_id=0, bos_token_id=1,
                                                         eos_token_id=2),
                 t.GPT2ForSequenceClassification, ["score"], 3, ["c_attn"], "SEQ_CLS"),
    "bart": Case(t.BartModel, bart, t.BartForSequenceClassification, ["classification_head"], 4,
                 ["q_proj", "fc1"], "SEQ_CLS"),
    "t5 tagger": Case(t.T5ForConditionalGeneration, t5, t.T5ForTokenClassification, ["classifier"], 4, ["q", "wo"],
                      "TOKEN_CLS", left_out="decoder."),
    "vit on the body": Case(t.ViTModel, vit, t.ViTForImageClassification, ["classifier"], 7, ["q_proj"],
                            left_out="pooler."),
    "vit with other labels": Case(t.ViTForImageClassification, lambda: vit(num_labels=10),
                                  t.ViTForImageClassification, ["classifier"], 3, ["q_proj"]),
    "vit, masked": Case(t.ViTForMaskedImageModeling, vit, t.ViTForImageClassification, ["classifier"], 3,
                        ["q_proj"], left_out="decoder."),
    "segformer": Case(t.SegformerForImageClassification, segformer, t.SegformerForSemanticSegmentation,
                      ["decode_head"], 5, ["q_proj"], left_out="classifier."),
    "wav2vec2": Case(t.Wav2Vec2ForPreTraining, wav2vec2, t.Wav2Vec2ForSequenceClassification,
                     ["projector", "classifier"], 6, ["q_proj"], left_out="quantizer."),
    "wav2vec2 letters": Case(t.Wav2Vec2Model, wav2vec2, t.Wav2Vec2ForCTC, ["lm_head"], None, ["q_proj"]),
    "whisper": Case(t.WhisperForConditionalGeneration, whisper, t.WhisperForAudioClassification,
                    ["projector", "classifier"], 4, ["q_proj"], left_out="model.decoder."),
    "spectrograms": Case(t.ASTModel, ast, t.ASTForAudioClassification, ["classifier"], 4, ["q_proj"]),
}  # fmt: skip


def trained_on(case: Case, base: Path) -> Any:
    labels = {} if case.labels is None else {"num_labels": case.labels}
    torch.manual_seed(7)
    return case.trained.from_pretrained(  # type: ignore[attr-defined]
        base, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
    ).eval()


def build(case: Case, folder: Path) -> tuple[Path, Path]:
    base = save_base(folder / "base", case.base, case.config(), case.dtype)
    return base, adapter_of(case, base, folder / "adapter")


def adapter_of(case: Case, base: Path, folder: Path) -> Path:
    settings: dict[str, Any] = {"target_modules": case.targets, "modules_to_save": case.saved}
    model = peft.get_peft_model(trained_on(case, base), lora(**settings, task_type=case.task_type))
    randomize(model, 2, tuple(n for n, p in model.named_parameters() if p.requires_grad), 0.2)
    model.save_pretrained(folder)
    return folder
