"""Honest merges pass, spoiled ones fail, and the tensor that was spoiled is named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice, MergeOptions, Source, ValidationResult
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import ValidationOptions
from lora_export.workflows.validating import validate_folder
from tests.builders import edit_json, edit_tensors
from tests.daily import daily
from tests.quantization.packing import gptq
from tests.validation.conftest import failed, judged, save_adapter

Folders = Callable[[str], tuple[Path, Path]]
Merged = Callable[[str], Path]
LAYER = "model.layers.{}.{}.weight"
Q, K, V, O = (f"self_attn.{x}_proj" for x in "qkvo")  # noqa: E741 - as the field names them
DOWN = "mlp.down_proj"


def check(base: Path, adapter: Path, merged: Path, **merge_options: Any) -> ValidationResult:
    return judged(base, adapter, merged, merge=MergeOptions(**merge_options))


def value(result: ValidationResult, name: str) -> float:
    return next(c.value for c in result.checks if c.name == name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_validate_honest_merge_passes(folders: Folders, merged: Merged, dtype: str) -> None:
    result = check(*folders(dtype), merged(dtype))
    assert not failed(result)
    assert value(result, "tensor_max_error") <= 1
    assert value(result, "logits_max_abs") <= 4 * value(result, "noise_floor_max_abs")
    assert value(result, "perplexity_unmerged") > 1


@pytest.mark.parametrize("seed", daily(range(5), (0,)))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_validate_has_no_false_alarm(folders: Folders, tmp_path: Path, dtype: str, seed: int) -> None:
    base, _ = folders(dtype)
    adapter = save_adapter(base, tmp_path / "adapter", seed + 100)
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    assert check(base, adapter, tmp_path / "merged").passed


def scaled(state: dict[str, torch.Tensor]) -> str:
    name = LAYER.format(1, V)
    state[name] = (state[name].float() * 1.02).to(state[name].dtype)
    return name


def scaled_untouched(state: dict[str, torch.Tensor]) -> str:
    name = LAYER.format(0, O)
    state[name] = (state[name].float() * 1.02).to(state[name].dtype)
    return name


def transposed_heads(state: dict[str, torch.Tensor]) -> str:
    name = LAYER.format(0, Q)
    state[name] = state[name].roll(16, 0).contiguous()
    return name


def shifted_embedding(state: dict[str, torch.Tensor]) -> str:
    name = "model.embed_tokens.weight"
    state[name] = state[name].roll(1, 0).contiguous()
    return name


def swapped(state: dict[str, torch.Tensor]) -> str:
    a, b = LAYER.format(0, DOWN), LAYER.format(1, DOWN)
    state[a], state[b] = state[b], state[a]
    return a


def one_element(state: dict[str, torch.Tensor]) -> str:
    name = "model.norm.weight"
    state[name][3] *= 1.01
    return name


@pytest.mark.parametrize("dtype", daily(("float32", "bfloat16"), ("bfloat16",)))
@pytest.mark.parametrize(
    "spoil", [scaled, scaled_untouched, transposed_heads, shifted_embedding, swapped, one_element]
)
def test_validate_spoiled_tensor_is_named(
    folders: Folders, merged: Merged, dtype: str, spoil: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    folder = merged(dtype)
    state = load_file(folder / "model.safetensors")
    name = spoil(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    result = check(*folders(dtype), folder)
    assert not result.passed
    assert name in result.weight_errors
    assert value(result, "tensor_errors") >= 1


def test_validate_missing_adapter_fails_on_outputs_and_tensors(folders: Folders, tmp_path: Path) -> None:
    base, adapter = folders("float32")
    merge(base, [], tmp_path / "merged")
    result = check(base, adapter, tmp_path / "merged")
    failed = {c.name for c in result.checks if not c.passed}
    assert {"logits_max_abs", "logits_kl_mean", "tensor_errors"} <= failed
    assert len(result.weight_errors) == 8  # four projections in two layers


def test_validate_wrong_quantization_option_fails(folders: Folders, tmp_path: Path) -> None:
    """Merged into the original base, judged against the dequantized one: not the trained function."""
    base, adapter = folders("bfloat16")
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    assert not check(base, adapter, tmp_path / "merged", training_quantization="nf4").passed


@pytest.mark.parametrize(("method", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)])
def test_validate_qlora_on_the_fly_passes(folders: Folders, tmp_path: Path, method: str, double: bool) -> None:
    base, adapter = folders("bfloat16")
    options: dict[str, Any] = {"training_quantization": method, "training_double_quant": double}
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged", MergeOptions(**options))
    result = check(base, adapter, tmp_path / "merged", **options)
    assert not failed(result)


def test_validate_two_weighted_adapters_passes(folders: Folders, tmp_path: Path) -> None:
    base, adapter = folders("float32")
    other = save_adapter(base, tmp_path / "other", 9)
    choices = [AdapterChoice(adapter, 0.7), AdapterChoice(other, 0.3)]
    merge(base, choices, tmp_path / "merged")
    assert not failed(judged(base, choices, tmp_path / "merged"))


def test_validate_gptq_base_uses_dequantized_weights(folders: Folders, tmp_path: Path) -> None:
    """transformers cannot load such a base here, and the copy that stands for it must not be rounded."""
    plain, adapter = folders("bfloat16")
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    changes: dict[str, torch.Tensor | None] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith(("v_proj.weight", "down_proj.weight")):
            module = name.removesuffix(".weight")
            changes |= gptq(*weight.shape, 4, 16, name=module)[0] | {name: None}
    edit_tensors(base / "model.safetensors", changes)
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16})
    merged = tmp_path / "merged"
    merge(base, [AdapterChoice(adapter)], merged)

    def validated() -> ValidationResult:
        sources = Source("base", base), [AdapterChoice(adapter)]
        return validate_folder(*sources, merged, (), (), ValidationOptions(), Silent())

    result = validated()
    assert not failed(result)
    state = load_file(merged / "model.safetensors")
    name = scaled(state)
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    assert validated().weight_errors == (name,)
