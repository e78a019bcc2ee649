"""Heads that the base does not have: the merged model of the task's class against PEFT's unmerged forward."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t

from lora_export.contracts import AdapterChoice, MergeOptions, VerifyOptions
from lora_export.errors import AdapterError, InputError, LoraExportError
from lora_export.merging import merge, plan
from lora_export.merging.certificate.verify import verify_folder
from lora_export.progress import Silent
from tests.builders import (
    bert_config,
    edit_json,
    edit_tensors,
    lora,
    randomize,
    save_base,
    tensors,
)
from tests.daily import daily, later
from tests.heads import CASES, Case, adapter_of, bert, build, trained_on, vit


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


EVERY_DAY = ("bert tagger on a masked model", "llama reward model", "vit with other labels")


@pytest.mark.parametrize("name", daily(CASES, EVERY_DAY))
def test_head_merge_has_trained_class(name: str, tmp_path: Path) -> None:
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


def test_head_of_unknown_task_needs_task_option(tmp_path: Path) -> None:
    base, adapter = build(TAGGER, tmp_path)
    error = refused(base, without_task(adapter), tmp_path / "out")
    assert isinstance(error, InputError) and "does not say for which task" in error.found
    assert "--task text-classification" in error.next_step and "--task token-classification" in error.next_step
    run(base, adapter, tmp_path / "out", task="token-classification")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [TAGGER.trained.__name__]
    certificate = json.loads((tmp_path / "out" / "lora_export_certificate.json").read_text())
    assert certificate["options"]["task"] == "token-classification"
    checked = verify_folder(tmp_path / "out", base, [AdapterChoice(adapter)], VerifyOptions(), Silent())
    assert checked.verified


def test_head_task_named_by_adapter_is_not_recorded(tmp_path: Path) -> None:
    base, adapter = build(TAGGER, tmp_path)
    run(base, adapter, tmp_path / "out", task="token-classification")
    certificate = json.loads((tmp_path / "out" / "lora_export_certificate.json").read_text())
    assert certificate["options"]["task"] is None


def test_head_with_one_matching_class_needs_no_task(tmp_path: Path) -> None:
    """Nothing names the task, and of all classes of a ViT only one has a classifier."""
    base, adapter = build(CASES["vit on the body"], tmp_path)
    planned = plan(base, [AdapterChoice(without_task(adapter))], MergeOptions())
    assert planned.model is not None and planned.model.architecture == "ViTForImageClassification"


@pytest.mark.parametrize(
    ("change", "task", "words"),
    [
        ({}, "text-classification", "says that it was trained as BertForTokenClassification"),
        ({"task_type": "QUESTION_ANS"}, None, "means BertForQuestionAnswering, which has no place"),
        later(({"task_type": None}, "question-answering", "means BertForQuestionAnswering, which has no place")),
        later(({"task_type": None}, "image-classification", "means no class for a bert")),
    ],
)
def test_head_of_other_task_is_refused(
    change: dict[str, Any], task: str | None, words: str, tmp_path: Path
) -> None:
    base, adapter = build(TAGGER, tmp_path)
    edit_json(adapter / "adapter_config.json", auto_mapping=None, **change)
    assert words in refused(base, adapter, tmp_path / "out", task=task).found


def test_task_without_new_head_is_refused(tmp_path: Path) -> None:
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
def test_head_merge_with_random_weights_is_refused(
    name: str, trained: type, saved: list[str], tensor: str, advice: str, tmp_path: Path
) -> None:
    """PEFT saved the head and not what training drew beside it."""
    case = replace(CASES[name], trained=trained, saved=saved, task_type=None)
    base, adapter = build(case, tmp_path)
    error = refused(base, adapter, tmp_path / "out")
    assert isinstance(error, AdapterError) and error.tensor == tensor and advice in error.next_step


@pytest.mark.slow
def test_head_with_too_many_labels_is_refused(tmp_path: Path) -> None:
    base, adapter = build(TAGGER, tmp_path)
    many = {"weight": torch.ones(100_001, 48, dtype=torch.float16), "bias": torch.ones(100_001)}
    edit_tensors(
        adapter / "adapter_model.safetensors", {f"base_model.model.classifier.{n}": v for n, v in many.items()}
    )
    assert "has no place" in refused(base, adapter, tmp_path / "out").found


def test_head_labels_are_named(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    daily(itertools.product(("old", "new"), repeat=2), [("old", "new"), ("new", "old")]),
)
def test_head_names_of_older_versions_are_mapped(of_base: str, of_adapter: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("architecture", daily(["BertForMaskedLM", None], ["BertForMaskedLM"]))
def test_head_on_old_base_layout_merges(architecture: str | None, tmp_path: Path) -> None:
    """bert-base: gamma and beta, a counter of positions, heads of pre-training under the name of another class."""
    case = replace(CASES["bert classifier on pre-training"], base=t.BertForPreTraining)
    base, adapter = build(case, tmp_path)
    changes: dict[str, torch.Tensor | None] = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    for name, value in tensors(base).items():
        new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        changes |= {name: None, new: value}
    edit_tensors(base / "model.safetensors", changes)
    edit_json(base / "config.json", architectures=architecture and [architecture])
    result = run(base, adapter, tmp_path / "out")
    oracle = peft.PeftModel.from_pretrained(trained_on(case, base), str(adapter)).eval()
    found, told = case.trained.from_pretrained(  # type: ignore[attr-defined]
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert relative(outputs(found.eval()), outputs(oracle)) <= 1e-5
    assert any("cls.* (7)" in w for w in result.warnings)


def test_head_is_written_to_last_shard(tmp_path: Path) -> None:
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


def test_head_adapter_combines_with_body_adapter(tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a padding token", "more layers"])
def test_head_with_changed_body_merges(what: str, tmp_path: Path) -> None:
    """A vocabulary resized for a reward model's padding token; layers replicated."""
    case, rows = CASES["llama reward model"], 107 if what == "a padding token" else None
    layers = None if rows else [[0, 2], [1, 2]]
    base = save_base(tmp_path / "base", case.base, case.config())

    def trained() -> Any:
        model = trained_on(case, base)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    settings: dict[str, Any] = {"target_modules": case.targets, "modules_to_save": ["score"]}
    model = peft.get_peft_model(trained(), lora(**settings, task_type="SEQ_CLS", layer_replication=layers))
    randomize(model, 2, tuple(n for n, p in model.named_parameters() if p.requires_grad), 0.2)
    randomize(model, 3, ("embed_tokens",) if rows else ())
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=bool(rows))
    run(base, tmp_path / "adapter", tmp_path / "out")
    oracle = peft.PeftModel.from_pretrained(trained(), str(tmp_path / "adapter")).eval()
    found = t.LlamaForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative(outputs(found.eval()), outputs(oracle)) <= 1e-5
    assert found.config.vocab_size == (rows or 101) and found.config.num_hidden_layers == (2 if rows else 3)


def test_head_already_in_base_is_planned_as_usual(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", t.BertForTokenClassification, bert_config())
    case = Case(t.BertForTokenClassification, bert, t.BertForTokenClassification, ["classifier"], 3)
    adapter = adapter_of(case, base, tmp_path / "adapter")
    planned = plan(base, [AdapterChoice(adapter)], MergeOptions())
    assert planned.model is None and not planned.config_changes and set(planned.tensors) == set(tensors(base))


def test_head_plan_names_class_and_omitted_weights(tmp_path: Path) -> None:
    base, adapter = build(CASES["bert tagger on a masked model"], tmp_path)
    model = plan(base, [AdapterChoice(adapter)], MergeOptions()).model
    assert model is not None
    assert model.words == "BertForTokenClassification, 5 labels; left out: cls.* (5)"
    assert model.brought == ("classifier.bias", "classifier.weight")
    assert set(model.left_out) == {n for n in tensors(base) if n.startswith("cls.")}
