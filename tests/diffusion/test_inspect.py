"""inspect of pipelines, of their models, and of single-file adapters; from headers alone."""

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from lora_export.commands.main import cli
from lora_export.errors import LoraExportError
from lora_export.workflows.inspection import inspect_folder
from tests.diffusion.made import UNET, Shapes, write_component, write_pipeline, write_tensors
from tests.test_startup import ask


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


# --- adapters ----------------------------------------------------------------------------------------------


Q, OUT = (f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{n}" for n in ("to_q", "to_out.0"))
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def pair(spelling: str, ends: tuple[str, str], rank: int, out: int = 8, inputs: int = 8) -> Shapes:
    return {f"{spelling}.{ends[0]}.weight": (rank, inputs), f"{spelling}.{ends[1]}.weight": (out, rank)}


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")


def write_kohya(path: Path, alphas: Mapping[str, float], metadata: dict[str, str] | None = None) -> Path:
    """LoRAs of rank 4 with an alpha each; numbers are zero."""
    tensors = {
        name: torch.zeros(shape) for module in alphas for name, shape in pair(kohya(module), KOHYA, 4).items()
    }
    tensors |= {f"{kohya(module)}.alpha": torch.tensor(alpha) for module, alpha in alphas.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("shapes", "format_", "components", "kinds", "targets"),
    [
        (
            {**pair(kohya(Q), KOHYA, 2), **pair("lora_te_" + TEXT.replace(".", "_"), KOHYA, 2, 6, 6)},
            "kohya", {"denoiser": 1, "text_encoder": 1}, {"lora": 2}, {"attn1_to_q": 1, "self_attn_q_proj": 1},
        ),
        (
            {**pair(f"unet.{OUT}", PEFT, 2), **pair(f"text_encoder.{TEXT}", PEFT, 2, 6, 6)},
            "diffusers", {"text_encoder": 1, "unet": 1}, {"lora": 2}, {"attn1.to_out.0": 1, "self_attn.q_proj": 1},
        ),
        (
            {f"{kohya(Q)}.hada_w{i}_{s}": (8, 2) if s == "a" else (2, 8) for i in "12" for s in "ab"},
            "kohya", {"denoiser": 1}, {"loha": 1}, {"attn1_to_q": 1},
        ),
        (
            {f"lycoris_{Q.replace('.', '_')}.lokr_w1": (2, 2), f"lycoris_{Q.replace('.', '_')}.lokr_w2": (4, 4)},
            "lycoris", {"denoiser": 1}, {"lokr": 1}, {"attn1_to_q": 1},
        ),
        (
            pair("diffusion_model.double_blocks.0.img_attn.qkv", PEFT, 2, 24),
            "original", {"denoiser": 1}, {"lora": 1}, {"img_attn.qkv": 1},
        ),
        (
            {**pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", KOHYA, 2),
             **pair("lora_unet_conv_in", KOHYA, 2), "lora_unet_conv_in.dora_scale": (8, 1)},
            "kohya", {"denoiser": 1, "text_encoder_3": 1}, {"dora": 1, "lora": 1},
            {"SelfAttention_q": 1, "conv_in": 1},
        ),
    ],
)  # fmt: skip
def test_inspect_file_tells_format_components_kinds_targets(
    tmp_path: Path, shapes: Shapes, format_: str, components: Any, kinds: Any, targets: Any
) -> None:
    found = inspect_folder(write_tensors(tmp_path / "style.safetensors", shapes))
    assert found["kind"] == "diffusion adapter" and found["format"] == format_
    assert (found["components"], found["kinds"], found["targets"]) == (components, kinds, targets)
    assert found["tensors"] == len(shapes) and not found["problems"] and not found["unknown_tensors"]


def test_inspect_file_tells_ranks_alphas_and_metadata_that_matters(tmp_path: Path) -> None:
    told_by_trainer = {
        "ss_base_model_version": "sd_v1",
        "ss_network_args": '{"conv_dim": "4", "algo": null}',
        "ss_tag_frequency": "x" * 1000,
    }
    path = write_kohya(tmp_path / "style.safetensors", {Q: 2.0, OUT: 8.0, "conv_in": 4.0}, told_by_trainer)
    found = inspect_folder(path)
    assert found["ranks"] == {"4": 3}
    assert found["alphas"] == {"2": 1, "4": 1, "8": 1} and found["scales"] == {"0.5": 1, "1": 1, "2": 1}
    assert found["metadata"] == {"ss_base_model_version": "sd_v1", "ss_network_args": {"conv_dim": "4"}}
    assert "differs between modules, 0.5 to 2" in found["summary"] and "for sd_v1" in found["summary"]


def test_inspect_file_reads_alpha_of_diffusers_metadata(tmp_path: Path) -> None:
    told_by_diffusers = json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {OUT: 1}})
    shapes = {**pair(f"unet.{Q}", PEFT, 2), **pair(f"unet.{OUT}", PEFT, 2)}
    path = write_tensors(tmp_path / "a.safetensors", shapes, {"lora_adapter_metadata": told_by_diffusers})
    assert inspect_folder(path)["scales"] == {"0.5": 1, "3": 1}
    bare = inspect_folder(write_tensors(tmp_path / "b.safetensors", shapes))
    assert bare["alphas"] == {"not in the file": 2} and "it counts as the rank" in bare["summary"]


def test_inspect_file_tells_tokens_of_vectors(tmp_path: Path) -> None:
    shapes = {"bundle_emb.ohwx.clip_l": (2, 6), "bundle_emb.ohwx.clip_g": (2, 9), **pair(kohya(Q), KOHYA, 2)}
    found = inspect_folder(write_tensors(tmp_path / "style.safetensors", shapes))
    assert found["tokens"] == {"ohwx": {"clip_l": 2, "clip_g": 2}} and found["kinds"] == {"lora": 1}


def test_inspect_file_names_half_pairs_and_unknown_endings(tmp_path: Path) -> None:
    shapes = {**pair(kohya(Q), KOHYA, 2), f"{kohya(OUT)}.lora_up.weight": (8, 2), "lora_unet_conv_in.odd": (1,)}
    found = inspect_folder(write_tensors(tmp_path / "style.safetensors", shapes))
    assert found["unknown_tensors"] == ["lora_unet_conv_in.odd"]
    (problem,) = found["problems"]
    assert "has lora_up without lora_down" in problem and f"{kohya(OUT)}.lora_up.weight" in problem


def test_inspect_controlnet_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x.safetensors", {"control_model.input_hint_block.0.weight": (2, 2)})
    with pytest.raises(LoraExportError, match="a ControlNet"):
        inspect_folder(path)


def test_inspect_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    write_kohya(tmp_path / "style" / "mine.safetensors", {Q: 4.0})
    assert inspect_folder(tmp_path / "style")["format"] == "kohya"
    assert "format  " in told(tmp_path / "style") and "attn1_to_q: 1" in told(tmp_path / "style")


# --- with a base -------------------------------------------------------------------------------------------


def test_inspect_with_base_counts_weights_that_would_change(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base")
    path = write_kohya(tmp_path / "style.safetensors", {Q: 2.0, OUT: 8.0})
    found = inspect_folder(path, base)
    assert found["fits_base"] is True and list(found["would_change"]) == ["unet"]
    assert found["would_change"]["unet"] == {
        "copied": 5, "updated": 2, "replaced": 0, "dequantized": 0, "converted": 0,
    }  # fmt: skip
    assert found["used_tensors"] == found["tensors"] == 6
    assert "fits base" in told(path, "-b", base)


def test_inspect_with_base_names_tensor_without_weight(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base")
    found = inspect_folder(write_kohya(tmp_path / "a.safetensors", {Q: 2.0, "down_blocks.9.x": 2.0}), base)
    assert found["fits_base"] is False
    assert "1 of 2 modules" in found["why_not"] and "lora_unet_down_blocks_9_x" in found["why_not"]
    shapes = pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", KOHYA, 2)
    found = inspect_folder(write_tensors(tmp_path / "b.safetensors", shapes), base)
    assert "a second text encoder" in found["why_not"] and "has one" in found["why_not"]


def test_inspect_with_base_names_weight_of_other_size(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base")
    path = write_tensors(tmp_path / "a.safetensors", pair(kohya(Q), KOHYA, 2, 16, 16))
    found = inspect_folder(path, base)
    assert found["fits_base"] is False and "16" in found["why_not"]


def test_inspect_with_language_model_says_that_it_is_none_of_images(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    found = inspect_folder(write_kohya(tmp_path / "a.safetensors", {Q: 2.0}), tmp_path / "base")
    assert found["fits_base"] is False and "no image model" in found["why_not"]


def test_inspect_peft_folder_with_pipeline_finds_component(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base")
    shapes = pair(f"base_model.model.{Q}", PEFT, 2)
    write_tensors(tmp_path / "peft" / "adapter_model.safetensors", shapes)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    found = inspect_folder(tmp_path / "peft", base)
    assert found["kind"] == "adapter" and found["fits_base"] is True
    assert found["would_change"]["unet"]["updated"] == 1


@pytest.mark.parametrize("with_base", [False, True])
def test_inspect_of_file_imports_no_library_of_models(tmp_path: Path, with_base: bool) -> None:
    path, base = write_kohya(tmp_path / "a.safetensors", {Q: 2.0}), write_pipeline(tmp_path / "base")
    text, found = ask("inspect", str(path), *(["-b", str(base)] if with_base else []))
    assert found["code"] == 0, text
    assert isinstance(found["modules"], list)
    assert not {"torch", "transformers", "diffusers", "peft", "onnx", "onnxruntime"} & set(found["modules"])


@pytest.mark.timing
def test_inspect_of_200_megabytes_takes_less_than_one_and_a_half_seconds(tmp_path: Path) -> None:
    names = [f"lora_unet_b_{i}_to_q" for i in range(720)]
    shapes = {k: s for name in names for k, s in pair(name, KOHYA, 64, 1152, 1152).items()}
    path = write_tensors(tmp_path / "a.safetensors", {**shapes, **{f"{name}.alpha": () for name in names}})
    assert path.stat().st_size > 200e6
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lora_export", "inspect", str(path)], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # of one core
