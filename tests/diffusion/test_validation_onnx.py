"""Exports of image models against the unmerged ones: numbers, arithmetic, and the share of the adapter."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_export.checkpoint.pipeline import open_pipeline
from lora_export.choices import Precision
from lora_export.contracts import ExportOptions
from lora_export.onnx_export.diffusion.pipeline_export import export_pipeline
from lora_export.progress import Silent
from tests.diffusion.conftest import Bases
from tests.diffusion.files import Plan, make
from tests.diffusion.test_validation import HALF, check, failed, merged_with, validated

ADAPTER = Plan(ranks=(4, 2), alphas=(2.0, 1.0), every=2, only=("unet",))


def exported(model: Path, output: Path, precision: Precision = "fp32") -> Path:
    export_pipeline(open_pipeline(model), output, ExportOptions(precision=precision), progress=Silent())
    return output


def turned(path: Path) -> None:
    """One number of a data file with its other sign."""
    data = np.memmap(path, np.uint8, "r+")
    data[len(data) // 2 // 4 * 4 + 3] ^= 0x80
    data.flush()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_graph_of_a_merged_unet_keeps_the_adapter(precision: Precision, bases: Bases, tmp_path: Path) -> None:
    base = bases("sd15", HALF) / "unet"
    made = make(tmp_path / "style.safetensors", base.parent, "sd15", "kohya", ADAPTER).path
    merged = merged_with(base, made, tmp_path / "merged")
    onnx = exported(merged, tmp_path / "onnx", precision)
    result = validated(base, made, merged, onnx=(onnx,))
    assert not failed(result)
    names = {c.name for c in result.checks}
    assert names >= {"onnx_unet_weight_errors", "onnx_unet_graph_max_abs", "onnx_unet_max_abs"}
    assert check(result, "onnx_adapter_survival").value > 0.9
    assert {s.model for s in result.adapter_survival} == {"merged", f"onnx {precision}"}

    turned(next(onnx.glob("*.onnx_data")))
    assert "onnx_unet_weight_errors" in failed(validated(base, made, merged, onnx=(onnx,)))


@pytest.mark.slow
def test_graph_of_the_base_in_place_of_the_merged_is_caught(bases: Bases, tmp_path: Path) -> None:
    base = bases("sd15", torch.float32) / "unet"
    made = make(tmp_path / "style.safetensors", base.parent, "sd15", "kohya", ADAPTER).path
    merged = merged_with(base, made, tmp_path / "merged")
    names = failed(validated(base, made, merged, onnx=(exported(base, tmp_path / "onnx"),)))
    assert names == {"onnx_unet_weight_errors", "onnx_unet_max_abs", "onnx_adapter_survival"}


@pytest.mark.slow
def test_graphs_of_a_whole_pipeline_make_the_picture(bases: Bases, tmp_path: Path) -> None:
    base = bases("sd15")
    made = make(tmp_path / "style.safetensors", base, "sd15", "kohya", Plan(every=3)).path
    merged = merged_with(base, made, tmp_path / "merged")
    onnx = exported(merged, tmp_path / "onnx")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    result = validated(base, made, merged, onnx=(onnx,), pictures=pictures)
    assert not failed(result)
    assert check(result, "onnx_image_psnr").value > 60
    assert [p.name for p in result.pictures][-2:] == ["onnx fp32", "onnx fp32 − unmerged"]
    graphs = [p.parent.name for p in onnx.glob("*/model.onnx")]
    assert {f"onnx_{name}_max_abs" for name in graphs} <= {c.name for c in result.checks}

    shutil.rmtree(onnx / "text_encoder")
    shutil.copytree(exported(base, tmp_path / "base onnx") / "text_encoder", onnx / "text_encoder")
    names = failed(validated(base, made, merged, onnx=(onnx,)))
    assert {"onnx_text_encoder_max_abs", "onnx_image_psnr"} <= names
