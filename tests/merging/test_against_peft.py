"""Merged models against PEFT's unmerged forward, and merged tensors against float64 arithmetic."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import Embedding, LoraLayer

from lora_export.contracts import AdapterChoice, MergeOptions, MergeResult
from lora_export.merging import merge
from tests.builders import (
    bert_config,
    edit_tensors,
    gpt2_config,
    llama_config,
    load,
    logits,
    lora,
    same_bytes,
    save_adapter,
    save_base,
    tensors,
    unmerged,
)

Llama = transformers.LlamaForCausalLM
GPT2 = transformers.GPT2LMHeadModel
Bert = transformers.BertForSequenceClassification
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_TARGETS = ["query", "value", "intermediate.dense"]
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp, relative


@dataclass(frozen=True)
class Case:
    """What to build, and what config.json must say afterwards about ties."""

    adapter: Callable[[], peft.LoraConfig]
    config: Callable[[], Any] = llama_config
    model: type = Llama
    dtype: torch.dtype = torch.float32
    max_shard_size: str | int = "5GB"
    rows: int | None = None
    save_embeddings: str | bool = "auto"
    tied_after: bool | None = None
    config_class_settings: dict[str, Any] = field(default_factory=dict)


def tied_llama() -> Any:
    return llama_config(tied=True)


def llama_with_biases() -> Any:
    return llama_config(attention_bias=True, mlp_bias=True)


def patterns() -> peft.LoraConfig:
    # The first key in the file's order wins; PEFT writes them sorted, so the order here is theirs.
    return lora(
        target_modules=ALL_LINEAR,
        rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 9, "mlp.down_proj": 4},
        alpha_pattern={"layers.1.self_attn.k_proj": 7, "q_proj": 5},
    )


CASES: dict[str, Case] = {
    "plain": Case(lora),
    "every linear layer, tied": Case(lambda: lora(target_modules=ALL_LINEAR), tied_llama, tied_after=True),
    "rslora": Case(lambda: lora(use_rslora=True)),
    "patterns": Case(patterns),
    "patterns with rslora": Case(
        lambda: lora(use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 4})
    ),
    "bias all": Case(lambda: lora(bias="all"), llama_with_biases),
    "bias lora_only": Case(lambda: lora(bias="lora_only"), llama_with_biases),
    "lora_bias": Case(lambda: lora(lora_bias=True), llama_with_biases),
    "lora_bias with rslora": Case(lambda: lora(lora_bias=True, use_rslora=True), llama_with_biases),
    "head saved, tied": Case(lambda: lora(modules_to_save=["lm_head"]), tied_llama, tied_after=False),
    "head saved, untied": Case(lambda: lora(modules_to_save=["lm_head"])),
    "norms saved": Case(lambda: lora(modules_to_save=["input_layernorm", "norm"])),
    "lora on the head, untied": Case(lambda: lora(target_modules=["lm_head", "q_proj"])),
    "lora on the head, tied": Case(
        lambda: lora(target_modules=["lm_head", "q_proj"]), tied_llama, tied_after=False
    ),
    "embedding": Case(lambda: lora(target_modules=["embed_tokens", "v_proj"])),
    "embedding, tied": Case(lambda: lora(target_modules=["embed_tokens", "v_proj"]), tied_llama, tied_after=False),
    "embedding and rslora": Case(lambda: lora(target_modules=["embed_tokens"], use_rslora=True)),
    "embedding saved, tied": Case(lambda: lora(modules_to_save=["embed_tokens"]), tied_llama, tied_after=False),
    "embedding saved, untied": Case(lambda: lora(modules_to_save=["embed_tokens", "lm_head"])),
    "resized, untied": Case(lora, rows=107, save_embeddings=True),
    "resized, tied": Case(lora, tied_llama, rows=107, save_embeddings=True),
    "shrunk, untied": Case(lora, rows=99, save_embeddings=True),
    "sharded": Case(lambda: lora(target_modules=ALL_LINEAR), max_shard_size=30_000),
    "sharded, head untied": Case(
        lambda: lora(modules_to_save=["lm_head"]), tied_llama, max_shard_size=30_000, tied_after=False
    ),
    "bfloat16": Case(lambda: lora(target_modules=ALL_LINEAR), dtype=torch.bfloat16),
    "float16": Case(lambda: lora(target_modules=ALL_LINEAR), dtype=torch.float16),
    "bfloat16 embedding": Case(
        lambda: lora(target_modules=["embed_tokens", "lm_head"]), dtype=torch.bfloat16, tied_after=False
    ),
    "gpt2": Case(lambda: lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), gpt2_config, GPT2),
    "gpt2 embedding": Case(
        lambda: lora(target_modules=["c_attn", "wte"], fan_in_fan_out=True), gpt2_config, GPT2, tied_after=False
    ),
    "gpt2 bias all": Case(
        lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all"), gpt2_config, GPT2
    ),
    "gpt2 bfloat16": Case(
        lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), gpt2_config, GPT2, torch.bfloat16
    ),
    "bert": Case(lambda: lora(target_modules=BERT_TARGETS), bert_config, Bert),
    "bert with its classifier": Case(
        lambda: lora(target_modules=BERT_TARGETS, modules_to_save=["classifier"]), bert_config, Bert
    ),
    "bert classifier and every bias": Case(
        lambda: lora(target_modules=BERT_TARGETS, modules_to_save=["classifier"], bias="all"), bert_config, Bert
    ),
    "bert embeddings": Case(lambda: lora(target_modules=["word_embeddings", "query"]), bert_config, Bert),
}


def build(case: Case, folder: Path) -> tuple[Path, Path]:
    base = save_base(folder / "base", case.model, case.config(), case.dtype, case.max_shard_size)
    adapter = save_adapter(
        folder / "adapter", base, case.adapter(), case.model, rows=case.rows, save_embeddings=case.save_embeddings
    )
    return base, adapter


def run(base: Path, adapter: Path, output: Path, **options: Any) -> MergeResult:
    return merge(base, [AdapterChoice(adapter)], output, MergeOptions(**options))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_merge_equals_unmerged_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, adapter = build(case, tmp_path)
    result = run(base, adapter, tmp_path / "out")
    oracle = unmerged(base, adapter, case.model, case.rows)
    _check_tensors(oracle, tmp_path / "out", case.dtype)
    expected = logits(oracle)
    assert relative(logits(load(base, case.model)), expected) > 1e-3 if case.rows is None else True
    found = logits(load(tmp_path / "out", case.model))
    assert relative(found, expected) <= (1e-5 if case.dtype == torch.float32 else 0.05)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if case.tied_after is not None:
        assert config["tie_word_embeddings"] is case.tied_after
    assert config["vocab_size"] == (case.rows or 101)
    assert result.adapter_tensors["used"] == len(tensors(adapter))


def _check_tensors(oracle: peft.PeftModel, merged: Path, dtype: torch.dtype) -> None:
    """Each adapted weight lies within half an ulp of the float64 result, plus what fp32 addition may lose."""
    found = tensors(merged)
    checked = 0
    for name, module in oracle.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        weight, a, b, s = _factors(module)
        if isinstance(module, Embedding):
            delta, size = (b @ a).T, (b.abs() @ a.abs()).T
        else:
            delta, size = b @ a, b.abs() @ a.abs()
            if getattr(module, "fan_in_fan_out", False):
                delta, size = delta.T, size.T
        exact = weight + s * delta
        bound = EPSILON[dtype] * exact.abs() + 2.0**-22 * (weight.abs() + s * size)
        ours = found[f"{name}.weight"]
        assert ours.dtype == dtype
        assert bool(((ours.double() - exact).abs() <= bound + 2.0**-25).all()), name
        checked += 1
    assert checked


def _factors(module: LoraLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    weight = module.get_base_layer().weight.detach().double()
    if isinstance(module, Embedding):
        a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    else:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return weight, a.detach().double(), b.detach().double(), module.scaling["default"]


def test_merge_copies_untouched_tensors_byte_for_byte(tmp_path: Path) -> None:
    base, adapter = build(CASES["sharded"], tmp_path)
    result = run(base, adapter, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {n for n in before if not same_bytes(before[n], after[n])}
    assert set(before) == set(after)
    assert changed == {r.name for r in result.records if r.operation == "updated"}
    assert len(changed) == 14
    shards = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert shards == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]


def test_merge_two_weighted_adapters_is_weighted_sum(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    first = save_adapter(tmp_path / "A", base, lora(target_modules=["q_proj", "o_proj"]), seed=3)
    second = save_adapter(tmp_path / "B", base, lora(rank=4, alpha=3, target_modules=["q_proj", "up_proj"]), seed=4)
    merge(base, [AdapterChoice(first, 0.7), AdapterChoice(second, 0.3)], tmp_path / "out")
    one, two = unmerged(base, first), unmerged(base, second)
    found = tensors(tmp_path / "out")
    for name, weight in tensors(base).items():
        exact = weight.double()
        for model, share in ((one, 0.7), (two, 0.3)):
            module = model.get_base_model().get_submodule(name.removesuffix(".weight"))
            if isinstance(module, LoraLayer):
                _, a, b, s = _factors(module)
                exact = exact + share * s * (b @ a)
        assert relative(found[name].double(), exact) < 1e-6, name
    both = peft.PeftModel.from_pretrained(load(base), str(first), adapter_name="a")
    both.load_adapter(str(second), adapter_name="b")
    for module in both.modules():
        if isinstance(module, LoraLayer):
            for key, share in (("a", 0.7), ("b", 0.3)):
                if key in module.scaling:
                    module.scaling[key] *= share
    both.base_model.set_adapter(["a", "b"])
    assert relative(logits(load(tmp_path / "out")), logits(both.eval())) < 1e-5


def test_merge_to_other_dtype_rounds_once(tmp_path: Path) -> None:
    base, adapter = build(CASES["plain"], tmp_path)
    run(base, adapter, tmp_path / "out", dtype="bfloat16")
    _check_tensors(unmerged(base, adapter), tmp_path / "out", torch.bfloat16)
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merge_float16_base_to_float32_keeps_whole_delta(tmp_path: Path) -> None:
    base, adapter = build(CASES["float16"], tmp_path)
    result = run(base, adapter, tmp_path / "out", dtype="float32")
    assert result.delta_survival == pytest.approx(1, abs=1e-8)
    assert relative(logits(load(tmp_path / "out")), logits(unmerged(base, adapter))) < 1e-5


@pytest.mark.parametrize("limit", [1, 9_000, 60_000, 10**9])
def test_merge_with_other_shard_size_has_same_tensors(tmp_path: Path, limit: int) -> None:
    base, adapter = build(CASES["plain"], tmp_path)
    run(base, adapter, tmp_path / "one")
    run(base, adapter, tmp_path / "many", max_shard_size=limit)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert all(same_bytes(one[n], many[n]) for n in one | many)
    files = list((tmp_path / "many").glob("*.safetensors"))
    single = limit > 10**8
    assert (len(files) == 1) is single
    assert (tmp_path / "many" / "model.safetensors.index.json").exists() is not single
    assert all(f.stat().st_size <= max(limit, 19_392) + 9_000 for f in files)
    assert relative(logits(load(tmp_path / "many")), logits(unmerged(base, adapter))) < 1e-5


def test_merge_adapter_of_body_fits_model_with_head(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, lora(), transformers.LlamaModel)
    result = run(base, adapter, tmp_path / "out")
    expected = logits(unmerged(base, adapter, transformers.LlamaModel))
    assert relative(logits(load(tmp_path / "out", transformers.LlamaModel)), expected) < 1e-5
    assert any("prefix" in text for text in result.warnings)


def test_merge_bfloat16_adapter_is_added_in_fp32(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = peft.get_peft_model(load(base), lora())
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "adapter")
    run(base, tmp_path / "adapter", tmp_path / "out")
    oracle = unmerged(base, tmp_path / "adapter")
    _check_tensors(oracle, tmp_path / "out", torch.float32)


def test_merge_masked_language_model_equals_unmerged(tmp_path: Path) -> None:
    masked = transformers.BertForMaskedLM
    base = save_base(tmp_path / "base", masked, bert_config())
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=BERT_TARGETS), masked)
    run(base, adapter, tmp_path / "out")
    assert relative(logits(load(tmp_path / "out", masked)), logits(unmerged(base, adapter, masked))) < 1e-5


def test_merge_base_with_tied_head_stored_twice_equals_unmerged(tmp_path: Path) -> None:
    """Some files hold lm_head beside the embedding although the config ties them."""
    base = save_base(tmp_path / "base", config=llama_config(tied=True))
    embedding = tensors(base)["model.embed_tokens.weight"]
    edit_tensors(base / "model.safetensors", {"lm_head.weight": embedding.clone()})
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["embed_tokens", "q_proj"]))
    run(base, adapter, tmp_path / "out")
    assert relative(logits(load(tmp_path / "out")), logits(unmerged(base, adapter))) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
