"""Pipelines of images: a merge is proven against the adapters' work on activations, and faults are seen.

Every check is seen to fail by a fault of its own.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.adapters.diffusion.kinds import kind_of
from lora_export.contracts import AdapterChoice, Check, MergeOptions, ValidationOptions, ValidationResult
from lora_export.contracts.pipelines import TrainedModule
from lora_export.errors import InputError
from lora_export.merging.pipelines.merging import merge_pipeline
from lora_export.progress import Silent
from lora_export.workflows.pipelines.validating import ADDED, validate_pipeline_folder
from tests.diffusion.conftest import Bases
from tests.diffusion.files import Plan, make

QUICK = ValidationOptions(seed=7, steps=1, size=16)
MIXED = Plan(kinds=("lora", "tucker"), ranks=(4, 2), alphas=(2.0, 1.0), every=3)
HALF = torch.bfloat16
Tensors = dict[str, torch.Tensor]


def validated(
    base: Path, made: Path, merged: Path, options: ValidationOptions = QUICK, pictures: Path | None = None,
    weight: float = 1.0, onnx: tuple[Path, ...] = (),
) -> ValidationResult:  # fmt: skip
    choices = [AdapterChoice(made, weight)]
    return validate_pipeline_folder(base, choices, merged, onnx, options, Silent(), pictures=pictures)


def merged_with(base: Path, made: Path, folder: Path, weight: float = 1.0, **options: Any) -> Path:
    merge_pipeline(base, [AdapterChoice(made, weight)], folder, MergeOptions(**options), Silent())
    return folder


def failed(result: ValidationResult) -> set[str]:
    return {c.name for c in result.checks if not c.passed}


def check(result: ValidationResult, name: str) -> Check:
    (found,) = [c for c in result.checks if c.name == name]
    return found


def change(path: Path, what: Callable[[Tensors], None]) -> Path:
    """Change the tensors of a file, or of a component's only weight file."""
    (file,) = path.glob("*.safetensors") if path.is_dir() else [path]
    tensors = load_file(file)
    what(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def test_validation_of_a_right_merge_passes_and_faults_fail(bases: Bases, tmp_path: Path) -> None:
    """One story and one with several faults, because each takes seconds."""
    base = bases("sd15", HALF)
    made = make(tmp_path / "style.safetensors", base, "sd15", "kohya", MIXED).path
    merged = merged_with(base, made, tmp_path / "merged")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    result = validated(base, made, merged, pictures=pictures)
    assert result.passed, failed(result)
    names = {c.name for c in result.checks}
    assert names >= {f"unet_t{time}_max_abs" for time in (1, 250, 500, 750, 999)}
    assert names >= {"unet_tensor_errors", "text_encoder_tensor_errors", "text_encoder_max_abs", "image_psnr"}
    assert "vae_stored_tensors_differ" in names and "vae_tensor_errors" not in names
    assert check(result, "adapter_effect_psnr").value < check(result, "image_psnr").value - 10
    assert [p.name for p in result.pictures][:2] == ["unmerged", "base"]
    assert all((pictures / p.file).is_file() and (p.width, p.height) == (16, 16) for p in result.pictures)
    assert not result.weight_errors and result.seed == 7

    change(merged / "unet", lambda t: t["mid_block.attentions.0.proj_in.weight"].mul_(1.5))
    change(merged / "text_encoder", lambda t: t["final_layer_norm.bias"].add_(0.25))
    change(merged / "vae", lambda t: t["decoder.conv_in.bias"].add_(0.25))
    scheduler = merged / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.02}))
    result = validated(base, made, merged)
    assert failed(result) >= {
        "unet_t1_max_abs", "unet_t999_max_abs", "text_encoder_stored_tensors_differ", "text_encoder_max_abs",
        "vae_stored_tensors_differ", "pipeline_files_differ", "latents_relative", "image_psnr",
    }  # fmt: skip
    assert "text_encoder_tensor_errors" not in failed(result)


def test_validation_of_a_unet_alone_shows_a_scaled_weight(bases: Bases, tmp_path: Path) -> None:
    """A factor that no output shows: 1.02 on one update in bf16."""
    base = bases("sd15", HALF)
    plan = Plan(every=6, only=("unet",))
    made = make(tmp_path / "style.safetensors", base, "sd15", "kohya", plan).path
    wrong = Path(shutil.copy(made, tmp_path / "wrong.safetensors"))
    name = next(n for n in load_file(made) if n.endswith("lora_up.weight"))
    change(wrong, lambda t: t[name].mul_(1.02))
    merged = merged_with(base / "unet", wrong, tmp_path / "merged")
    result = validated(base / "unet", made, merged)
    assert failed(result) == {"unet_tensor_errors", "unet_tensor_max_error"}
    assert len(result.weight_errors) == 1 and result.weight_errors[0].startswith("unet: ")

    change(merged, lambda t: t.pop("conv_out.bias"))
    assert failed(validated(base / "unet", made, merged)) >= {"unet_loads", "unet_stored_tensors_differ"}


def test_validation_with_other_options_than_the_certificate_is_refused(bases: Bases, tmp_path: Path) -> None:
    base = bases("sd15", HALF)
    made = make(tmp_path / "style.safetensors", base, "sd15", "kohya", Plan(every=20)).path
    merged = merged_with(base, made, tmp_path / "merged", skip=("text_encoder",))
    with pytest.raises(InputError, match="--skip"):
        validated(base, made, merged, replace(QUICK, merge=MergeOptions(skip=("unet",))))
    with pytest.raises(InputError, match="--text with a pipeline"):
        validated(base, made, merged, replace(QUICK, text=made))
    with pytest.raises(InputError, match="this is none"):
        validated(base, made, base / "tokenizer")


def test_sums_that_an_unmerged_forward_shows_are_named_as_kinds_are() -> None:
    def kind(*parts: str) -> str:
        return kind_of(TrainedModule("a", "unet", (), {part: part for part in parts}))

    made = {kind("lora_down", "lora_up"), kind("lora_down", "lora_up", "lora_mid"), kind("hada_w1_a"), kind("diff")}
    assert made | {kind("lokr_w1")} == ADDED
