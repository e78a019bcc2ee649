"""Derived adapters: loaded by PEFT, merged by us, and their errors against numpy's singular values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open

from lora_export.adapter_tools import combine, extract, truncate
from lora_export.adapter_tools.saving import Rank
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError, CheckpointError, InputError, OutputError
from lora_export.merging import merge
from tests.builders import (
    bert_config,
    edit_tensors,
    gpt2_config,
    llama_config,
    load,
    logits,
    lora,
    randomize,
    save_adapter,
    save_base,
    tensors,
    unmerged,
)

Llama = transformers.LlamaForCausalLM
GPT2 = transformers.GPT2LMHeadModel
Bert = transformers.BertForSequenceClassification


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("deriving") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    kinds = [lora(4, 7, target_modules=["q_proj", "down_proj"]), lora(3, 5, target_modules=["down_proj", "v_proj"])]
    return [save_adapter(base.parent / f"a{i}", base, kind, seed=30 + i) for i, kind in enumerate(kinds)]


def choices(adapters: list[Path], weights: tuple[float, ...] = (0.7, -0.4)) -> list[AdapterChoice]:
    return [AdapterChoice(a, w) for a, w in zip(adapters, weights, strict=True)]


def deltas(base: Path, merged: Path) -> dict[str, np.ndarray]:
    before, after = tensors(base), tensors(merged)
    return {n: (after[n].double() - t.double()).numpy() for n, t in before.items() if not torch.equal(after[n], t)}


def close(first: Path, second: Path, tolerance: float = 1e-6) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=tolerance, atol=tolerance), name


# --- combine ------------------------------------------------------------------------------------------------


def test_combine_sum_is_exact_and_loads_in_peft(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    made = combine(choices(adapters), tmp_path / "both", MergeOptions(combine="cat"))
    assert made.error < 1e-12
    assert set(made.ranks.values()) == {3, 4, 7}
    merge(base, choices(adapters), tmp_path / "in-turn")
    merge(base, [AdapterChoice(made.output)], tmp_path / "merged")
    close(tmp_path / "in-turn", tmp_path / "merged")
    ours, theirs = logits(load(tmp_path / "in-turn")), logits(unmerged(base, made.output))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_combine_rank_error_matches_numpy(base: Path, adapters: list[Path], tmp_path: Path, rank: int) -> None:
    made = combine(choices(adapters), tmp_path / "both", MergeOptions(combine="linear"), Rank(rank))
    merge(base, choices(adapters), tmp_path / "whole")
    merge(base, [AdapterChoice(made.output)], tmp_path / "merged")
    whole, less = deltas(base, tmp_path / "whole"), deltas(base, tmp_path / "merged")
    lost = total = 0.0
    for name, delta in whole.items():
        sizes = np.linalg.svd(delta, compute_uv=False)
        beyond = float(np.sqrt((sizes[rank:] ** 2).sum()))
        assert np.linalg.norm(delta - less[name]) == pytest.approx(beyond, rel=1e-4, abs=1e-5)
        lost, total = lost + beyond**2, total + float((sizes**2).sum())
    assert made.error == pytest.approx((lost / total) ** 0.5, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune", "svd"])
def test_combine_then_merge_equals_merge_combined(
    base: Path, adapters: list[Path], tmp_path: Path, method: str
) -> None:
    density = None if method == "svd" else 0.5
    made = combine(
        choices(adapters), tmp_path / "both", MergeOptions(combine=method, density=density, seed=4), Rank(3)
    )
    options = MergeOptions(combine=method, density=density, seed=4, svd_rank=3)
    merge(base, choices(adapters), tmp_path / "direct", options)
    merge(base, [AdapterChoice(made.output)], tmp_path / "merged")
    close(tmp_path / "direct", tmp_path / "merged", 1e-5)


def test_combine_additive_kinds_gives_lora(base: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj"]
    loha = save_adapter(tmp_path / "loha", base, peft.LoHaConfig(r=2, alpha=3, target_modules=targets), seed=5)
    made = combine([AdapterChoice(loha)], tmp_path / "lora", MergeOptions(combine="linear"), Rank(4))
    assert made.error < 1e-6  # a Hadamard product of two ranks of 2 has a rank of 4
    merge(base, [AdapterChoice(loha)], tmp_path / "one")
    merge(base, [AdapterChoice(made.output)], tmp_path / "two")
    close(tmp_path / "one", tmp_path / "two", 1e-5)


def test_combine_embeddings_and_conv1d_keeps_layout(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", GPT2, gpt2_config())
    kind = lora(3, 5, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)
    adapter = save_adapter(tmp_path / "adapter", base, kind, GPT2, save_embeddings=False)
    made = combine([AdapterChoice(adapter, 0.5)], tmp_path / "half", MergeOptions(combine="linear"))
    merge(base, [AdapterChoice(adapter, 0.5)], tmp_path / "one")
    merge(base, [AdapterChoice(made.output)], tmp_path / "two")
    close(tmp_path / "one", tmp_path / "two")
    model = peft.PeftModel.from_pretrained(load(base, GPT2), str(made.output))
    assert torch.allclose(logits(model), logits(load(tmp_path / "two", GPT2)), atol=1e-4)


def test_combine_kinds_that_need_a_base_is_refused(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    dora = save_adapter(tmp_path / "dora", base, lora(target_modules=["q_proj"], use_dora=True))
    whole = save_adapter(tmp_path / "whole", base, lora(target_modules=["q_proj"], modules_to_save=["v_proj"]))
    for bad, words in ((dora, "dora is not a delta"), (whole, "modules_to_save is not a delta")):
        with pytest.raises(AdapterError, match=words):
            combine(choices([adapters[0], bad]), tmp_path / "out", MergeOptions(combine="linear"))
    with pytest.raises(InputError, match="--rank together with --energy"):
        combine(choices(adapters), tmp_path / "out", MergeOptions(combine="linear"), Rank(2, 0.9))
    with pytest.raises(OutputError, match="lies inside an input"):
        combine(choices(adapters), adapters[0], MergeOptions(combine="linear"), force=True)
    assert not (tmp_path / "out").exists()


# --- extract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extract_from_merge_returns_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", dtype=dtype)
    adapter = save_adapter(tmp_path / "adapter", base, lora(4, 7, target_modules=["q_proj", "down_proj"]))
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    made = extract(base, tmp_path / "merged", tmp_path / "back", Rank(4))
    assert set(made.ranks.values()) == {4} and not made.whole
    widened = save_base(tmp_path / "wide")
    save_wide(base, widened)
    merge(widened, [AdapterChoice(adapter)], tmp_path / "true")
    merge(widened, [AdapterChoice(made.output)], tmp_path / "again")
    rounding = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}[dtype]
    true, again = deltas(widened, tmp_path / "true"), deltas(widened, tmp_path / "again")
    assert true.keys() == again.keys()
    for name, delta in true.items():
        after = np.abs(tensors(tmp_path / "true")[name].double().numpy())
        noise = rounding * np.linalg.norm(after)  # of rounding each weight once
        assert np.linalg.norm(again[name] - delta) <= noise, name


def save_wide(base: Path, out: Path) -> None:
    edit_tensors(out / "model.safetensors", {n: t.float() for n, t in tensors(base).items()})


def tuned_from(base: Path, out: Path, model: type, names: tuple[str, ...], scale: float = 0.05) -> Path:
    """Fully tuned: noise on every weight whose name holds one of these."""
    tuned = load(base, model)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    randomize(tuned, 77, names, scale)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if any(n in name for n in names):
                noise = parameter - 1 if "norm" in name.lower() and name.endswith("weight") else parameter
                parameter.copy_(before[name] + noise)
    tuned.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("model", "config", "names"),
    [
        (Llama, llama_config, ("q_proj", "down_proj", "embed_tokens", "norm")),
        (Bert, bert_config, ("query", "intermediate", "LayerNorm", "classifier")),
        (GPT2, gpt2_config, ("c_attn", "c_proj", "ln_1")),
    ],
)  # fmt: skip
def test_extract_at_full_rank_restores_model(
    tmp_path: Path, model: type, config: Any, names: tuple[str, ...]
) -> None:
    base = save_base(tmp_path / "base", model, config())
    tuned = tuned_from(base, tmp_path / "tuned", model, names)
    made = extract(base, tuned, tmp_path / "adapter", Rank(200))
    assert made.error < 1e-6 and made.whole
    assert torch.allclose(logits(unmerged(base, made.output, model)), logits(load(tuned, model)), atol=1e-5)
    merge(base, [AdapterChoice(made.output)], tmp_path / "merged")
    close(tuned, tmp_path / "merged", 1e-5)


def test_extract_energy_sets_rank(base: Path, tmp_path: Path) -> None:
    tuned = tuned_from(base, tmp_path / "tuned", Llama, ("q_proj", "down_proj"))
    made = extract(base, tuned, tmp_path / "adapter", Rank(energy=0.9))
    for module, rank in made.ranks.items():
        delta = (tensors(tuned)[f"{module}.weight"] - tensors(base)[f"{module}.weight"]).double().numpy()
        kept = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2) / np.linalg.norm(delta) ** 2
        assert kept[rank - 1] >= 0.9 > (kept[rank - 2] if rank > 1 else 0)
    assert made.as_json()["energy_kept"] >= 0.9


def test_extract_rest_is_dropped_or_refused(base: Path, tmp_path: Path) -> None:
    tuned = tuned_from(base, tmp_path / "tuned", Llama, ("q_proj", "input_layernorm"))
    dropped = extract(base, tuned, tmp_path / "dropped", Rank(2), "drop").dropped
    assert dropped == tuple(f"model.layers.{i}.input_layernorm.weight" for i in range(2))
    with pytest.raises(CheckpointError, match="a weight that LoRA cannot represent") as refused:
        extract(base, tuned, tmp_path / "refused", Rank(2), "refuse")
    assert refused.value.tensor == dropped[0] and "--rest save" in str(refused.value.next_step)
    assert not (tmp_path / "refused").exists()


def test_extract_from_unrelated_models_is_refused(base: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", config=llama_config(hidden_size=56))
    more = save_base(tmp_path / "more", config=llama_config(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="the shape is"):
        extract(base, other, tmp_path / "out", Rank(2))
    with pytest.raises(CheckpointError, match="in only one of the two models"):
        extract(base, more, tmp_path / "out", Rank(2))
    with pytest.raises(InputError, match="neither --rank nor --energy"):
        extract(base, base, tmp_path / "out", Rank())
    with pytest.raises(AdapterError, match="every delta is zero"):
        extract(base, base, tmp_path / "out", Rank(2))


# --- truncate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}], ids=str)
def test_truncate_drops_smallest_singular_values(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora(**settings))
    merge(base, [AdapterChoice(adapter)], tmp_path / "whole")
    made = truncate(adapter, tmp_path / "less", Rank(2))
    merge(base, [AdapterChoice(made.output)], tmp_path / "merged")
    whole, less = deltas(base, tmp_path / "whole"), deltas(base, tmp_path / "merged")
    lost = total = 0.0
    for name, delta in whole.items():
        sizes = np.linalg.svd(delta, compute_uv=False)
        assert np.linalg.norm(delta - less[name]) == pytest.approx(np.sqrt((sizes[2:] ** 2).sum()), rel=1e-4)
        lost, total = lost + (sizes[2:] ** 2).sum(), total + (sizes**2).sum()
    assert made.error == pytest.approx((lost / total) ** 0.5, rel=1e-5)


def test_truncate_energy_sets_rank_per_module(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora(8))
    made = truncate(adapter, tmp_path / "less", Rank(energy=0.9))
    assert len(set(made.ranks.values())) > 1
    config = json.loads((made.output / "adapter_config.json").read_text())
    assert config["r"] == max(made.ranks.values()) and config["rank_pattern"] == config["alpha_pattern"]
    model = unmerged(base, made.output)
    ranks = {n: m.r["default"] for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert ranks == dict(made.ranks)
    assert all(m.scaling["default"] == 1.0 for m in model.modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize(
    "kind",
    [
        lora(use_dora=True),
        lora(lora_bias=True),
        lora(modules_to_save=["lm_head"]),
        lora(trainable_token_indices={"embed_tokens": [3, 8]}),
    ],
    ids=["dora", "lora_bias", "modules_to_save", "tokens"],
)
def test_truncate_keeps_tensors_without_rank(tmp_path: Path, kind: Any) -> None:
    base = save_base(tmp_path / "base", config=llama_config(attention_bias=True, mlp_bias=True))
    adapter = save_adapter(tmp_path / "adapter", base, kind)
    made = truncate(adapter, tmp_path / "same", Rank(6))
    assert made.error < 1e-7 and (made.whole or "lora_B.bias" in str(tensors(made.output).keys()))
    assert torch.allclose(logits(unmerged(base, made.output)), logits(unmerged(base, adapter)), atol=1e-5)
    merge(base, [AdapterChoice(adapter)], tmp_path / "one")
    merge(base, [AdapterChoice(made.output)], tmp_path / "two")
    close(tmp_path / "one", tmp_path / "two", 1e-5)


def test_truncate_kinds_without_rank_is_refused(base: Path, tmp_path: Path) -> None:
    loha = save_adapter(tmp_path / "loha", base, peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="loha has no matrices A and B") as refused:
        truncate(loha, tmp_path / "out", Rank(2))
    assert "combine" in str(refused.value.next_step)
    with pytest.raises(InputError, match="neither --rank nor --energy"):
        truncate(loha, tmp_path / "out", Rank())


def test_saved_adapter_type_range_is_checked(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    made = truncate(adapters[0], tmp_path / "half", Rank(2), "bfloat16")
    with safe_open(made.output / "adapter_model.safetensors", "pt") as file:
        assert {file.get_slice(n).get_dtype() for n in file.keys()} == {"BF16"}  # noqa: SIM118
        assert file.metadata()["made_by"].endswith("truncate")
    huge = tmp_path / "huge"
    save_adapter(huge, base, lora(target_modules=["q_proj"]), scale=1e6)
    with pytest.raises(AdapterError, match="beyond the range of float16"):
        truncate(huge, tmp_path / "out", Rank(2), "float16")
    assert not (tmp_path / "out").exists()
