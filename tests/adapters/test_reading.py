"""Adapter files of every spelling: names, patterns, and keys that must all be used."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from lora_export.adapters import AdapterFile, read_adapter
from lora_export.adapters.config import parse_lora
from lora_export.adapters.module import part
from lora_export.adapters.saved import base_name
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import Adapter
from lora_export.errors import AdapterError

A, B = torch.randn(4, 10), torch.randn(6, 4)


def adapter(folder: Path, values: dict[str, torch.Tensor], **config: Any) -> Adapter:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in values.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 10} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    config, tensors = open_adapter_files(folder)
    return read_adapter(AdapterFile(tensors, config, folder / "adapter_config.json"))


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.", ""])
@pytest.mark.parametrize("ending", [".weight", ".default.weight"])
def test_read_linear_key_spellings_are_accepted(tmp_path: Path, prefix: str, ending: str) -> None:
    found = adapter(tmp_path, {f"{prefix}x.q_proj.lora_A{ending}": A, f"{prefix}x.q_proj.lora_B{ending}": B})
    (update,) = found.updates
    assert update.target == "x.q_proj.weight"
    assert update.shapes == ((6, 10), (10, 6))
    weight = torch.randn(6, 10)
    expected = weight + 2.5 * (B @ A)
    torch.testing.assert_close(update.load((6, 10)).apply(weight.clone(), slice(0, 6)), expected)
    torch.testing.assert_close(update.load((6, 10)).apply(weight[2:5].clone(), slice(2, 5)), expected[2:5])
    torch.testing.assert_close(update.load((10, 6)).apply(weight.T.clone(), slice(0, 10)), expected.T)


def test_read_names_are_mapped() -> None:
    assert base_name("score.modules_to_save.bias") == "score.bias"
    assert base_name("q_proj.base_layer.bias") == "q_proj.bias"
    assert part("x.lora_A.weight", "lora_A") == part("x.lora_A", "lora_A") == "x"
    assert part("x.lora_A.weight", "lora_B") is None


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 3},
        {"proj": 3},
        {"layers.1.q_proj": 5, "q_proj": 3},
        {"q_proj": 3, "layers.1.q_proj": 5},
        {r"^model\.layers\.1\.q_proj": 5},
        {r"layers\.[01]\.(q|k)_proj": 5},
        {r".*\.1\.q_proj": 5},
        {"layers.1": 5},
    ],
)
@pytest.mark.parametrize(
    "module", ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.11.q_proj", "q_proj"]
)
@pytest.mark.parametrize("rslora", [False, True])
def test_rank_patterns_match_like_peft(pattern: dict[str, int], module: str, rslora: bool, tmp_path: Path) -> None:
    config = parse_lora({"r": 7, "lora_alpha": 9, "rank_pattern": pattern, "use_rslora": rslora}, tmp_path)
    rank = pattern.get(get_pattern_key(pattern.keys(), module), 7)
    assert config.scaling(module, rank) == pytest.approx(9 / (math.sqrt(rank) if rslora else rank))
    with pytest.raises(AdapterError, match="rank"):
        config.scaling(module, rank + 1)
    alphas = parse_lora({"r": 7, "lora_alpha": 9, "alpha_pattern": pattern}, tmp_path)
    assert alphas.scaling(module, 7) == pytest.approx(pattern.get(get_pattern_key(pattern.keys(), module), 9) / 7)


def test_modules_to_save_match_like_peft(tmp_path: Path) -> None:
    values = {
        "base_model.model.x.lora_A.weight": A,
        "base_model.model.x.lora_B.weight": B,
        "base_model.model.layers.0.input_layernorm.weight": torch.ones(10),
        "base_model.model.score.dense.weight": torch.ones(3, 10),
    }
    found = adapter(tmp_path, values, modules_to_save=["norm", "score"])
    kinds = {u.target: u.kind for u in found.updates}
    assert kinds["layers.0.input_layernorm.weight"] == kinds["score.dense.weight"] == "modules_to_save"
    with pytest.raises(AdapterError, match="no adapter kind accounts"):
        adapter(tmp_path, values, modules_to_save=["layer", "dens"])


def test_saved_bias_replaces_base_bias(tmp_path: Path) -> None:
    values = {
        "base_model.model.x.lora_A.weight": A,
        "base_model.model.x.lora_B.weight": B,
        "base_model.model.score.original_module.bias": torch.zeros(3),
        "base_model.model.score.modules_to_save.bias": torch.ones(3),
        "base_model.model.score.bias": torch.ones(3),
    }
    found = adapter(tmp_path, values, modules_to_save=["score"], bias="all")
    update = next(u for u in found.updates if u.target == "score.bias")
    assert len(update.keys) == 3 and found.tensor_count == 5
    assert torch.equal(update.load((3,)).apply(torch.zeros(3), slice(0, 3)), torch.ones(3))


def test_saved_bias_without_setting_is_refused(tmp_path: Path) -> None:
    values = {"x.lora_A.weight": A, "x.lora_B.weight": B, "x.bias": torch.ones(6)}
    with pytest.raises(AdapterError, match="no adapter kind accounts"):
        adapter(tmp_path, values, bias="none")
    assert {u.kind for u in adapter(tmp_path, values, bias="all").updates} == {"lora", "bias"}


def test_refusals_read_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.checkpoint import TensorFiles

    def explode(*arguments: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorFiles, "read_into", explode)
    found = adapter(tmp_path, {"x.lora_A.weight": A, "x.lora_B.weight": B})
    with pytest.raises(AssertionError, match="was read"):
        found.updates[0].load((6, 10))
