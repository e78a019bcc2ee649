"""inspect of pipelines, of their models, and of single-file adapters; from headers alone."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_export.commands.main import cli
from lora_export.errors import LoraExportError
from lora_export.workflows.inspection import inspect_folder
from tests.diffusion.made import UNET, write_component, write_pipeline


def told(*arguments: str | Path) -> str:
    """What the command prints."""
    done = CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


# --- pipelines ---------------------------------------------------------------------------------------------


def test_inspect_pipeline_tells_each_model(tmp_path: Path) -> None:
    found = inspect_folder(write_pipeline(tmp_path / "base"))
    assert found["kind"] == "pipeline" and found["class"] == "StableDiffusionPipeline"
    assert found["denoiser"] == "unet" and found["saved_by_diffusers"] == "0.42.1"
    unet, text = found["components"]["unet"], found["components"]["text_encoder"]
    assert (unet["parameters"], unet["bytes"], unet["dtypes"]) == (752, 1504, {"F16": 7})
    assert (text["class"], text["parameters"]) == ("CLIPTextModel", 234)
    assert found["parameters"] == 752 + 234 and found["bytes"] == 1504 + 468
    assert found["without_weights"] == {"scheduler": "DDIMScheduler"} and found["absent"] == ["safety_checker"]


def test_inspect_pipeline_prints_row_for_each_model(tmp_path: Path) -> None:
    lines = told(write_pipeline(tmp_path / "base")).splitlines()
    assert next(x for x in lines if x.startswith("unet")).split()[1:4] == ["UNet2DConditionModel", "752", "F16:"]
    assert any(x.startswith("text_encoder ") for x in lines)


def test_inspect_unet_folder_tells_class_and_files(tmp_path: Path) -> None:
    folder = write_component(tmp_path / "unet", "UNet2DConditionModel", UNET, "fp16", in_channels=4)
    found = inspect_folder(folder)
    assert (found["kind"], found["role"], found["class"]) == ("component", "unet", "UNet2DConditionModel")
    assert found["variants"] == ["fp16"] and found["files"] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert found["settings"] == {"in_channels": 4} and found["tensors"] == 7


def test_inspect_pipeline_lists_variants(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "base", "fp16")
    write_component(folder / "unet", "UNet2DConditionModel", UNET)
    found = inspect_folder(folder)["components"]
    assert found["unet"]["variants"] == ["none", "fp16"] and found["text_encoder"]["variants"] == ["none"]


def test_inspect_pipeline_with_pickled_weights_says_so(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "base")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(folder / "text_encoder" / "pytorch_model.bin")
    found = inspect_folder(folder)
    assert "only pickled weights" in found["components"]["text_encoder"]["problem"]
    assert found["parameters"] == 752
    assert "only pickled weights" in told(folder)


def test_inspect_pipeline_that_names_code_is_refused(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Mine"]}))
    with pytest.raises(LoraExportError, match="_class_name is"):
        inspect_folder(folder)
