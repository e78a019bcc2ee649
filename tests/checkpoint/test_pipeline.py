"""Pipelines of diffusers opened by their index, and the names of weight files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_export.checkpoint.adapter_files import single_file
from lora_export.checkpoint.pipeline import is_pipeline, open_component, open_pipeline
from lora_export.checkpoint.reader import open_checkpoint
from lora_export.checkpoint.weight_files import WeightFiles, named, variants_in, weight_files
from lora_export.errors import CheckpointError, InputError, LoraExportError

UNET = {"_class_name": "UNet2DConditionModel"}


def component(folder: Path, name: str = "diffusion_pytorch_model.safetensors", config: Any = UNET) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"conv_in.weight": torch.ones(2, 2)}, folder / name)


def pipeline(folder: Path, **more: Any) -> Path:
    component(folder / "unet")
    (folder / "scheduler").mkdir()
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index | more))
    return folder


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("model.safetensors", WeightFiles()),
        ("model-00001-of-00002.safetensors", WeightFiles()),
        ("model.safetensors.index.json", WeightFiles()),
        ("model.fp16.safetensors", WeightFiles("model", "fp16")),
        ("diffusion_pytorch_model.safetensors", WeightFiles("diffusion_pytorch_model")),
        ("diffusion_pytorch_model.fp16.safetensors", WeightFiles("diffusion_pytorch_model", "fp16")),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", WeightFiles("diffusion_pytorch_model", "fp16")),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", WeightFiles("diffusion_pytorch_model", "fp16")),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", WeightFiles("diffusion_pytorch_model", "fp16")),
        ("adapter_model.safetensors", None),
        ("sd_xl_base_1.0.safetensors", None),
        ("model.onnx", None),
    ],
)
def test_named_weight_file_tells_its_set(file: str, expected: WeightFiles | None) -> None:
    assert named(file) == expected


def test_weight_files_names_are_those_of_diffusers() -> None:
    files = WeightFiles("diffusion_pytorch_model", "fp16")
    assert files.single == "diffusion_pytorch_model.fp16.safetensors"
    assert files.index == "diffusion_pytorch_model.safetensors.index.fp16.json"
    assert all(named(n) == files for n in (files.single, files.index, files.shard(1, 3)))


def test_weight_files_variant_is_chosen_and_only_one_is_taken(tmp_path: Path) -> None:
    component(tmp_path, "diffusion_pytorch_model.fp16.safetensors")
    assert weight_files(tmp_path).variant == "fp16"  # the only one there is
    component(tmp_path)
    assert weight_files(tmp_path).variant == "" and variants_in(tmp_path) == ("", "fp16")
    assert open_checkpoint(tmp_path, "fp16").files.variant == "fp16"
    with pytest.raises(InputError, match="no weights of the variant bf16"):
        weight_files(tmp_path, "bf16")


def test_weight_files_two_sets_are_refused(tmp_path: Path) -> None:
    component(tmp_path)
    component(tmp_path, "model.safetensors")
    with pytest.raises(CheckpointError, match="several sets of weights"):
        weight_files(tmp_path)


def test_pipeline_components_with_weights_are_models(tmp_path: Path) -> None:
    opened = open_pipeline(pipeline(tmp_path))
    assert is_pipeline(tmp_path) and opened.class_name == "StableDiffusionPipeline"
    assert list(opened.components) == ["unet"] and opened.others == ("scheduler",)
    assert opened.denoiser is not None and opened.denoiser.class_name == "UNet2DConditionModel"
    assert list(open_component(opened.components["unet"]).tensors) == ["conv_in.weight"]


def test_pipeline_of_a_model_alone_is_one_component(tmp_path: Path) -> None:
    component(tmp_path)
    opened = open_pipeline(tmp_path)
    assert is_pipeline(tmp_path) and opened.class_name is None and list(opened.components) == ["unet"]


def test_pipeline_of_transformers_is_none(tmp_path: Path) -> None:
    component(tmp_path, "model.safetensors", {"architectures": ["LlamaForCausalLM"]})
    assert not is_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"_class_name": ["pipeline.py", "MyPipeline"]}, "_class_name is"),
        ({"unet": ["my_unet.py", "UNet"]}, "the component 'unet' is"),
        ({"../outside": ["diffusers", "UNet2DConditionModel"]}, "the component '../outside' is"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "the component vae is not there"),
        ({"unet": [None, None]}, "no model with weights"),
    ],
)
def test_pipeline_index_that_names_code_or_nothing_is_refused(tmp_path: Path, told: Any, found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        open_pipeline(pipeline(tmp_path, **told))


def test_pipeline_pickled_component_is_refused(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, vae=["diffusers", "AutoencoderKL"])
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        open_component(open_pipeline(folder).components["vae"])


def test_single_file_of_adapter_is_found_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"a": torch.ones(1)}, file)
    assert single_file(file) == single_file(tmp_path) == file
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="2 adapters here"):
        single_file(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert single_file(tmp_path) == tmp_path / "pytorch_lora_weights.safetensors"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert single_file(tmp_path) is None
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(LoraExportError, match="pickled"):
        single_file(tmp_path / "old.ckpt")
