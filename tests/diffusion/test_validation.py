"""Pipelines of images: a merge is proven against the adapters' work on activations, and faults are seen.

Every check is seen to fail by a fault of its own.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice, Check, MergeOptions, ValidationOptions, ValidationResult
from lora_export.merging.pipelines.merging import merge_pipeline
from lora_export.progress import Silent
from lora_export.workflows.pipelines.validating import validate_pipeline_folder
from tests.diffusion.conftest import Bases
from tests.diffusion.files import Made, Plan, make

QUICK = ValidationOptions(seed=7, steps=2, size=16)
MIXED = Plan(kinds=("lora", "tucker"), ranks=(4, 2), alphas=(2.0, 1.0))
HALF = torch.bfloat16
Tensors = dict[str, torch.Tensor]


def validated(
    base: Path, made: Made, merged: Path, options: ValidationOptions = QUICK, pictures: Path | None = None,
    weight: float = 1.0, onnx: tuple[Path, ...] = (),
) -> ValidationResult:  # fmt: skip
    choices = [AdapterChoice(made.path, weight)]
    return validate_pipeline_folder(base, choices, merged, onnx, options, Silent(), pictures=pictures)


def merged_with(base: Path, made: Made, folder: Path, weight: float = 1.0, **options: object) -> Path:
    how = MergeOptions(**options)  # type: ignore[arg-type]
    merge_pipeline(base, [AdapterChoice(made.path, weight)], folder, how, Silent())
    return folder


def failed(result: ValidationResult) -> set[str]:
    return {c.name for c in result.checks if not c.passed}


def check(result: ValidationResult, name: str) -> Check:
    (found,) = [c for c in result.checks if c.name == name]
    return found


def change(folder: Path, what: Callable[[Tensors], None]) -> None:
    """Change the tensors of a component's only weight file."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    what(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_validation_of_a_right_merge_passes_and_faults_fail(bases: Bases, tmp_path: Path) -> None:
    """One story and one with several faults, because each takes seconds."""
    base = bases("sd15", HALF)
    made = make(tmp_path / "style.safetensors", base, "sd15", "kohya", MIXED)
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

    broken = tmp_path / "broken"
    shutil.copytree(merged, broken)
    change(broken / "unet", lambda t: t["mid_block.attentions.0.proj_in.weight"].mul_(1.5))
    change(broken / "text_encoder", lambda t: t["final_layer_norm.bias"].add_(0.25))
    change(broken / "vae", lambda t: t["decoder.conv_in.bias"].add_(0.25))
    scheduler = broken / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.02}))
    result = validated(base, made, broken)
    assert failed(result) >= {
        "unet_tensor_errors", "unet_tensor_max_error", "unet_t1_max_abs", "unet_t999_max_abs",
        "text_encoder_stored_tensors_differ", "text_encoder_max_abs", "vae_stored_tensors_differ",
        "pipeline_files_differ", "latents_relative", "image_psnr",
    }  # fmt: skip
    assert result.weight_errors == ("unet: mid_block.attentions.0.proj_in.weight",)
    assert "text_encoder_tensor_errors" not in failed(result)
