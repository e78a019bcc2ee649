"""PEFT's rarer kinds beyond the matrix: what their configurations decide, and what a file alone cannot tell."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.adapters import adamss
from lora_export.adapters.peanut import ACTIVATIONS
from lora_export.adapters.registry import _NEVER
from lora_export.adapters.registry import KINDS as READ
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import LoraExportError, RuntimeUnavailable
from lora_export.merging import merge, plan
from lora_export.workflows.inspection import inspect_folder
from tests.builders import bert_config, handmade_base, randomize
from tests.matrix.families import FAMILIES, Family
from tests.matrix.kinds import KINDS, SELDOM
from tests.matrix.test_matrix import train

LLAMA = FAMILIES["llama"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LLAMA.save(tmp_path_factory.mktemp("llama") / "base")


def error_of(merged: Path, base: Path, adapter: Path, family: Family = LLAMA) -> float:
    """The largest difference of the merged model's answers from PEFT's unmerged ones, relative, in float64."""
    expected = family.answer(peft.PeftModel.from_pretrained(family.load(base), str(adapter)).eval())
    found = family.answer(family.load(merged))
    return float((found - expected).abs().max() / expected.abs().max())


def rewritten(adapter: Path, change: Any) -> Path:
    """The adapter with its tensors as `change` leaves them."""
    file = adapter / "adapter_model.safetensors"
    values = load_file(file)
    change(values)
    save_file(values, file)
    return adapter


def test_registry_every_peft_type_is_merged_or_refused() -> None:
    known = set(READ)
    older = {"BONE"}  # which PEFT has called MISS since 0.19
    assert {t.value for t in peft.PeftType} | older == known | _NEVER.keys()
    assert not known & _NEVER.keys()


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (peft.FrodConfig(target_modules=["q_proj"], init_weights=False, save_projection=False), "save_projection"),
        (
            peft.SupertuningConfig(
                target_modules=["q_proj"], init_weights=False, sparsity=0.9, save_precomputed_indices=False
            ),
            "save_precomputed_indices",
        ),
    ],
    ids=["frod", "supertuning"],
)
def test_refusal_code_saves_missing_state(config: Any, option: str, llama: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(LLAMA.load(llama), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraExportError, match=f"{option} is false") as caught:
        merge(llama, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    code = str(caught.value.next_step).partition(": ")[2]
    paths = {"ADAPTER": str(tmp_path / "adapter"), "DIR": str(tmp_path / "saved")}
    exec(code, {"PeftModel": peft.PeftModel, "BASE_MODEL": LLAMA.load(llama), **paths})
    merge(llama, [AdapterChoice(tmp_path / "saved")], tmp_path / "merged")
    assert error_of(tmp_path / "merged", llama, tmp_path / "saved") < 1e-5


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": r".*layers\.1\..*(q|down)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": "all-linear"},
    ],
    ids=["expression", "layers", "pattern", "all-linear"],
)
def test_unilora_layers_follow_configuration(chosen: Any, llama: Path, tmp_path: Path) -> None:
    config = peft.UniLoraConfig(theta_d_length=30, init_weights=False, **chosen)
    peft.get_peft_model(LLAMA.load(llama), config).save_pretrained(tmp_path / "adapter")
    merge(llama, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    assert error_of(tmp_path / "merged", llama, tmp_path / "adapter") < 1e-5


def test_unilora_class_decides_its_layers(tmp_path: Path) -> None:
    """The head of the pre-training has a `dense` more than a classifier has, and all share one drawing."""
    base = transformers.BertForPreTraining(bert_config())
    randomize(base, 1)
    base.save_pretrained(tmp_path / "base")
    classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    config = peft.UniLoraConfig(
        task_type="SEQ_CLS", theta_d_length=30, init_weights=False, target_modules=["query", "dense"]
    )
    unmerged = peft.get_peft_model(classifier, config)
    unmerged.save_pretrained(tmp_path / "adapter")
    saved = tmp_path / "adapter" / "adapter_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"modules_to_save": None}))
    rewritten(tmp_path / "adapter", lambda values: [values.pop(k) for k in list(values) if "classifier" in k])
    merge(tmp_path / "base", [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    tokens = torch.arange(3, 12)[None]
    body = transformers.BertModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False).double().eval()
    with torch.no_grad():
        expected = unmerged.double().eval().base_model.model.bert(tokens)[0]
        plain = transformers.BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False).double().eval()
        found, before = body(tokens)[0], plain(tokens)[0]
    assert float((found - expected).abs().max()) < 1e-5 < float((before - expected).abs().max())


def test_sparse_positions_outside_weight_are_refused(llama: Path, tmp_path: Path) -> None:
    train(llama, LLAMA, "supertuning", tmp_path / "adapter")
    name = "base_model.model.model.layers.0.self_attn.q_proj.supertuning_indices"

    def outside(values: dict[str, torch.Tensor]) -> None:
        values[name][0] = 48 * 48

    rewritten(tmp_path / "adapter", outside)
    with pytest.raises(LoraExportError, match=r"indices from \d+ to 2304") as caught:
        merge(llama, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    assert caught.value.expected == "whole numbers from 0 to 2303" and caught.value.tensor == name


def test_adamss_on_other_base_is_refused(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    train(llama, LLAMA, "adamss", tmp_path / "adapter")
    other = LLAMA.load(llama)
    randomize(other, 77)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LoraExportError, match="the outputs fall into clusters of"):
        merge(tmp_path / "other", [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def _adamss(folder: Path) -> tuple[Path, Path]:
    """A base of one layer, and an adapter whose B are of five and of three of its eight outputs."""
    shapes = {"proj.weight": (8, 6), "proj.bias": (8,)}
    config = {"peft_type": "ADAMSS", "r": 4, "num_subspaces": 2, "random_seed": 3, "target_modules": ["proj"]}
    parts = {"newB": (4, 7), "A.0": (2, 4), "B.0": (5, 2), "A.1": (1, 4), "B.1": (3, 1)}
    generator = torch.Generator().manual_seed(7)
    values = {f"base_model.model.proj.adamss_{n}": torch.randn(s, generator=generator) for n, s in parts.items()}
    base, adapter = handmade_base(folder / "base", shapes), folder / "adapter"
    adapter.mkdir()
    save_file(values, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def test_adamss_without_scikit_learn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = _adamss(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(RuntimeUnavailable, match="k-means, which is not installed"):
        plan(base, [AdapterChoice(adapter)], MergeOptions())


def test_adamss_pairs_update_rows_of_their_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = _adamss(tmp_path)
    labels = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0])
    seen = []

    def cluster(points: torch.Tensor, count: int) -> torch.Tensor:
        seen.append((points, count))
        return labels

    monkeypatch.setattr(adamss, "cluster", cluster)
    monkeypatch.setattr(adamss, "_k_means", lambda: None)
    merge(base, [AdapterChoice(adapter, 0.5)], tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    parts = {
        k.rpartition("adamss_")[2]: v.double() for k, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    delta = torch.zeros(8, 7, dtype=torch.float64)
    for i in range(2):
        delta[labels == i] = parts[f"B.{i}"] @ parts[f"A.{i}"] @ parts["newB"]
    torch.testing.assert_close(after["proj.weight"].double(), before["proj.weight"].double() + delta[:, :-1] / 2)
    torch.testing.assert_close(after["proj.bias"].double(), before["proj.bias"].double() + delta[:, -1] / 2)
    # Of the weight with the bias beside it, by the left singular vectors.
    both = torch.cat([before["proj.weight"], before["proj.bias"][:, None]], dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wanted = torch.svd_lowrank(both, q=4, niter=2)[0]
    assert all(count == 2 for _, count in seen)
    torch.testing.assert_close(seen[0][0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_peanut_every_activation_equals_formula(activation: str, llama: Path, tmp_path: Path) -> None:
    config = peft.PeanutConfig(r=4, depth=1, act_fn=activation, scaling=0.5, target_modules=["q_proj"])
    model = peft.get_peft_model(LLAMA.load(llama), config)
    randomize(model, 2, tuple(n for n, p in model.named_parameters() if p.requires_grad), 0.4)
    model.save_pretrained(tmp_path / "adapter")
    merge(llama, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    assert error_of(tmp_path / "merged", llama, tmp_path / "adapter") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in sorted(SELDOM) if KINDS[k](LLAMA) is not None])
def test_inspect_rarer_kinds_names_kind(kind: str, llama: Path, tmp_path: Path) -> None:
    train(llama, LLAMA, kind, tmp_path / "adapter")
    found = inspect_folder(tmp_path / "adapter", llama)
    assert found["mergeable"] and found["fits_base"] and found["rank"] in (4, 6, 12, None)
    assert found["scaling"] is None or kind in ("deft", "deft qr", "supertuning supra")
    assert all(int(rank) == 4 for rank in found["ranks"])


def test_combine_unilora_is_refused(llama: Path, tmp_path: Path) -> None:
    for kind in ("unilora", "lora"):
        train(llama, LLAMA, kind, tmp_path / kind)
    options = MergeOptions(combine="linear", combine_on="factors")
    with pytest.raises(LoraExportError, match="--combine-on factors, but this is unilora"):
        plan(llama, [AdapterChoice(tmp_path / "unilora"), AdapterChoice(tmp_path / "lora")], options)
