"""Heads that the base does not have: the merged model of the task's class against PEFT's unmerged forward."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t

from lora_export.contracts import AdapterChoice, MergeOptions, VerifyOptions
from lora_export.errors import AdapterError, InputError, LoraExportError
from lora_export.merging import merge, plan
from lora_export.merging.verification import verify_folder
from lora_export.progress import Silent
from tests.builders import (
    bert_config,
    edit_json,
    edit_tensors,
    llama_config,
    lora,
    randomize,
    save_base,
    tensors,
)
from tests.daily import daily

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


def outputs(model: Any) -> torch.Tensor:
    """float64 outputs on seeded inputs of whatever kind the model takes."""
    body = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    generator = torch.Generator().manual_seed(9)
    config, kind = body.config, body.main_input_name
    if kind == "input_ids":
        inputs = torch.randint(3, 97, (3, 17), generator=generator)
        inputs[:, -1] = getattr(config, "eos_token_id", None) or 2  # BART's classifier reads this one
    elif kind == "pixel_values":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, int) else 32
        inputs = torch.randn((2, 3, size, size), generator=generator).double()
    elif kind == "input_features":
        inputs = torch.randn((2, 8, 40), generator=generator).double()
    elif "max_length" in config.to_dict() and body.__class__.__name__.startswith("AST"):
        inputs = torch.randn((2, 16, 8), generator=generator).double()
    else:
        inputs = torch.randn((2, 900), generator=generator).double()
    with torch.no_grad():
        found = model.double()(**{kind: inputs})
    logits: torch.Tensor = found.start_logits if "start_logits" in found else found.logits
    return logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def run(base: Path, adapter: Path, output: Path, **options: Any) -> Any:
    return merge(base, [AdapterChoice(adapter)], output, MergeOptions(**options))


EVERY_DAY = ("bert tagger on a masked model", "llama reward model", "vit with other labels", "whisper")


@pytest.mark.parametrize("name", daily(CASES, EVERY_DAY))
def test_merged_model_is_of_the_class_that_was_trained(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, adapter = build(case, tmp_path)
    result = run(base, adapter, tmp_path / "out")
    oracle = peft.PeftModel.from_pretrained(trained_on(case, base), str(adapter)).eval()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == [case.trained.__name__]
    merged, told = getattr(t, written["architectures"][0]).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert relative(outputs(merged.eval()), outputs(oracle)) <= (1e-5 if case.dtype == torch.float32 else 0.05)
    if case.labels is not None:
        assert merged.config.num_labels == case.labels
    trained_on(case, base).to(case.dtype).save_pretrained(tmp_path / "as-transformers")
    named = tensors(tmp_path / "as-transformers")
    found = tensors(tmp_path / "out")
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in named.items()}
    assert {v.dtype for v in found.values() if v.is_floating_point()} == {case.dtype}
    if case.left_out is not None:
        assert any(case.left_out in w and "left out" in w for w in result.warnings)
    checked = verify_folder(tmp_path / "out", base, [AdapterChoice(adapter)], VerifyOptions(), Silent())
    assert checked.verified, [f for f in checked.checks if not f.passed]


TAGGER = CASES["bert tagger on the body"]


def without_task(adapter: Path) -> Path:
    edit_json(adapter / "adapter_config.json", task_type=None, auto_mapping=None)
    return adapter


def refused(base: Path, adapter: Path, output: Path, **options: Any) -> LoraExportError:
    with pytest.raises(LoraExportError) as caught:
        run(base, adapter, output, **options)
    assert not output.exists()
    return caught.value


def test_head_of_an_unknown_task_is_asked_for_and_then_recorded(tmp_path: Path) -> None:
    base, adapter = build(TAGGER, tmp_path)
    error = refused(base, without_task(adapter), tmp_path / "out")
    assert isinstance(error, InputError) and "does not say of which task" in error.found
    assert "--task text-classification" in error.next_step and "--task token-classification" in error.next_step
    run(base, adapter, tmp_path / "out", task="token-classification")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [TAGGER.trained.__name__]
    certificate = json.loads((tmp_path / "out" / "lora_export_certificate.json").read_text())
    assert certificate["options"]["task"] == "token-classification"
    checked = verify_folder(tmp_path / "out", base, [AdapterChoice(adapter)], VerifyOptions(), Silent())
    assert checked.verified


def test_task_that_the_adapter_names_itself_leaves_no_trace(tmp_path: Path) -> None:
    base, adapter = build(TAGGER, tmp_path)
    run(base, adapter, tmp_path / "out", task="token-classification")
    certificate = json.loads((tmp_path / "out" / "lora_export_certificate.json").read_text())
    assert certificate["options"]["task"] is None


def test_one_class_alone_has_the_place_of_the_head(tmp_path: Path) -> None:
    """Nothing names the task, and of all classes of a ViT only one has a classifier."""
    base, adapter = build(CASES["vit on the body"], tmp_path)
    planned = plan(base, [AdapterChoice(without_task(adapter))], MergeOptions())
    assert planned.model is not None and planned.model.architecture == "ViTForImageClassification"


@pytest.mark.parametrize(
    ("change", "task", "words"),
    [
        ({}, "text-classification", "says that it was trained as BertForTokenClassification"),
        ({}, "image-classification", "says that it was trained as BertForTokenClassification"),
        ({"task_type": "QUESTION_ANS"}, None, "means BertForQuestionAnswering, which has no place"),
        ({"task_type": None}, "question-answering", "means BertForQuestionAnswering, which has no place"),
        ({"task_type": None}, "image-classification", "means no class for a bert"),
    ],
)
def test_task_that_the_head_does_not_fit_is_refused(
    change: dict[str, Any], task: str | None, words: str, tmp_path: Path
) -> None:
    base, adapter = build(TAGGER, tmp_path)
    edit_json(adapter / "adapter_config.json", auto_mapping=None, **change)
    assert words in refused(base, adapter, tmp_path / "out", task=task).found


def test_task_without_a_new_head_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", t.BertForTokenClassification, bert_config())
    case = Case(t.BertForTokenClassification, bert, t.BertForTokenClassification, ["classifier"], 3)
    adapter = adapter_of(case, base, tmp_path / "adapter")
    assert "brings no head" in refused(base, adapter, tmp_path / "out", task="text-classification").found
    run(base, adapter, tmp_path / "out", task="token-classification")


@pytest.mark.parametrize(
    ("name", "trained", "saved", "tensor", "advice"),
    [
        ("bert tagger on a masked model", t.BertForSequenceClassification, ["classifier"],
         "bert.pooler.dense.weight", '["classifier", "pooler"]'),
        ("roberta", t.RobertaForSequenceClassification, ["classifier.out_proj"], "classifier.dense.weight",
         '["classifier"]'),
        ("wav2vec2", t.Wav2Vec2ForSequenceClassification, ["classifier"], "projector.weight",
         '["classifier", "projector"]'),
    ],
)  # fmt: skip
def test_model_with_random_weights_never_leaves(
    name: str, trained: type, saved: list[str], tensor: str, advice: str, tmp_path: Path
) -> None:
    """PEFT saved the head and not what training drew beside it."""
    case = replace(CASES[name], trained=trained, saved=saved, task_type=None)
    base, adapter = build(case, tmp_path)
    error = refused(base, adapter, tmp_path / "out")
    assert isinstance(error, AdapterError) and error.tensor == tensor and advice in error.next_step


def test_names_of_the_labels(tmp_path: Path) -> None:
    """Those beside the adapter; the base's, if there are as many; or none that anybody knows."""
    base, adapter = build(CASES["vit with other labels"], tmp_path)
    result = run(base, adapter, tmp_path / "unknown")
    assert any("LABEL_0 … LABEL_2" in w for w in result.warnings)
    names = {"0": "cat", "1": "dog", "2": "owl"}
    (adapter / "config.json").write_text(json.dumps({"id2label": names}))
    result = run(base, adapter, tmp_path / "known")
    assert not any("LABEL_" in w for w in result.warnings)
    written = json.loads((tmp_path / "known" / "config.json").read_text())
    assert written["id2label"] == names and written["label2id"] == {"cat": 0, "dog": 1, "owl": 2}
    body = save_base(tmp_path / "body", t.ViTModel, vit(id2label=dict(enumerate("abcdefg"))))
    of_body = adapter_of(CASES["vit on the body"], body, tmp_path / "of_body")
    result = run(body, of_body, tmp_path / "as_the_base")
    assert not any("LABEL_" in w for w in result.warnings)
    assert json.loads((tmp_path / "as_the_base" / "config.json").read_text())["id2label"]["6"] == "g"


OLD_VIT = (
    (".layers.", ".encoder.layer."), (".attention.q_proj", ".attention.attention.query"),
    (".attention.k_proj", ".attention.attention.key"), (".attention.v_proj", ".attention.attention.value"),
    (".attention.o_proj", ".attention.output.dense"), (".mlp.fc1", ".intermediate.dense"),
    (".mlp.fc2", ".output.dense"),
)  # fmt: skip


def respell(path: Path, old: bool) -> None:
    """Names as transformers wrote them before version 5, or as its modules have been called since then."""
    changes: dict[str, torch.Tensor | None] = {}
    for name, value in tensors(path.parent).items():
        new = f".{name}"
        for pair in OLD_VIT:
            new = new.replace(*(pair if old else pair[::-1]))
        changes |= {name: None, new[1:]: value}
    edit_tensors(path, changes)


@pytest.mark.parametrize("of_base", ["old", "new"])
@pytest.mark.parametrize("of_adapter", ["old", "new"])
def test_names_before_and_after_a_renaming(of_base: str, of_adapter: str, tmp_path: Path) -> None:
    case = CASES["vit on the body"]
    base, adapter = build(case, tmp_path)
    oracle = outputs(peft.PeftModel.from_pretrained(trained_on(case, base), str(adapter)).eval())
    respell(base / "model.safetensors", of_base == "old")
    respell(adapter / "adapter_model.safetensors", of_adapter == "old")
    assert any("query" in n for n in tensors(base)) is (of_base == "old")
    assert any("query" in n for n in tensors(adapter)) is (of_adapter == "old")
    result = run(base, adapter, tmp_path / "out")
    merged = case.trained.from_pretrained(tmp_path / "out", dtype=torch.float32)  # type: ignore[attr-defined]
    assert relative(outputs(merged.eval()), oracle) <= 1e-5
    assert result.adapter_tensors["used"] == 6
    assert any("query" in n for n in tensors(tmp_path / "out")) is (of_base == "old")  # the base's own spelling


def test_shards_keep_their_tensors_and_the_last_one_gets_the_head(tmp_path: Path) -> None:
    case = CASES["llama reward model"]
    base = save_base(tmp_path / "base", case.base, case.config(), max_shard_size=30_000)
    adapter = adapter_of(case, base, tmp_path / "adapter")
    run(base, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    before = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {n: f for n, f in before.items() if n != "lm_head.weight"} | {
        "score.weight": sorted(before.values())[-1]
    }
    found = t.LlamaForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    oracle = peft.PeftModel.from_pretrained(trained_on(case, base), str(adapter)).eval()
    assert relative(outputs(found.eval()), outputs(oracle)) <= 1e-5


def test_adapter_of_the_language_model_beside_one_with_a_head(tmp_path: Path) -> None:
    """Both act on the body, one brings the head; and no two may bring it."""
    case = CASES["llama reward model"]
    base, head = build(case, tmp_path)
    language = replace(case, trained=t.LlamaForCausalLM, saved=[], labels=None, task_type="CAUSAL_LM")
    plain = adapter_of(language, base, tmp_path / "plain")
    merge(base, [AdapterChoice(plain, 0.5), AdapterChoice(head)], tmp_path / "out")
    model, matrices = trained_on(case, base).double(), tensors(plain)
    for name, parameter in model.named_parameters():
        key = f"base_model.model.{name.removesuffix('weight')}lora_"
        if f"{key}A.weight" in matrices:
            a, b = (matrices[f"{key}{m}.weight"].double() for m in "AB")
            parameter.data += 0.5 * 15 / 6 * (b @ a)
    oracle = peft.PeftModel.from_pretrained(model, str(head)).eval()
    found = t.LlamaForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative(outputs(found.eval()), outputs(oracle)) <= 1e-5
    with pytest.raises(AdapterError, match="two adapters replace"):
        merge(base, [AdapterChoice(head), AdapterChoice(head)], tmp_path / "twice")


def test_model_that_has_the_head_already_is_planned_as_ever(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", t.BertForTokenClassification, bert_config())
    case = Case(t.BertForTokenClassification, bert, t.BertForTokenClassification, ["classifier"], 3)
    adapter = adapter_of(case, base, tmp_path / "adapter")
    planned = plan(base, [AdapterChoice(adapter)], MergeOptions())
    assert planned.model is None and not planned.config_changes and set(planned.tensors) == set(tensors(base))


def test_the_plan_tells_the_class_and_what_is_left_out(tmp_path: Path) -> None:
    base, adapter = build(CASES["bert tagger on a masked model"], tmp_path)
    model = plan(base, [AdapterChoice(adapter)], MergeOptions()).model
    assert model is not None
    assert model.words == "BertForTokenClassification, 5 labels; left out: cls.* (5)"
    assert model.brought == ("classifier.bias", "classifier.weight")
    assert set(model.left_out) == {n for n in tensors(base) if n.startswith("cls.")}
