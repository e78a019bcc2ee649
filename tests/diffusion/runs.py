"""A run of a pipeline, made by hand: really merged, with graphs that copy; no library of models is needed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

from lora_export import manifest
from lora_export.contracts import (
    AdapterChoice,
    Check,
    MergeOptions,
    Source,
    Story,
    StoryOptions,
    ValidationResult,
)
from lora_export.contracts.option import kept
from lora_export.merging.pipelines.merging import merge_pipeline
from lora_export.onnx_export import records
from lora_export.onnx_export.records import ComponentRecord, ExportRecord, load_export
from lora_export.progress import Silent
from lora_export.storage import sealed
from lora_export.workflows.run_report import write_report

UNET, ENCODER = "down_blocks.0.attn.to_q", "text_model.encoder.layers.0.self_attn.q_proj"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
GRAPHS = {"unet": "unet", "text_encoder": "text_encoder", "vae_encoder": "vae", "vae_decoder": "vae"}
CARD = "---\nlicense: creativeml-openrail-m\n---\n\n# A base\n"


def save_base(folder: Path, variant: str = "") -> Path:
    """A UNet of one layer, a text encoder of one, a VAE, a scheduler and a tokenizer."""
    name = f"diffusion_pytorch_model{variant}.safetensors"
    unet = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "sample_size": 16}
    _model(folder / "unet", {f"{UNET}.weight": torch.eye(6)}, name, unet)
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [16, 32], "latent_channels": 4}
    _model(folder / "vae", {"decoder.conv_in.bias": torch.ones(3)}, name, vae)
    clip = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    _model(folder / "text_encoder", {f"{ENCODER}.weight": torch.eye(4)}, f"model{variant}.safetensors", clip)
    _write(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", "beta_end": 0.012})
    _write(folder / "tokenizer" / "tokenizer.json", {"version": "1.0"})
    _write(folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"})
    _write(folder / "tokenizer" / "vocab.json", {"a": 0})
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.md").write_text("The licence of the base.\n")
    _write(folder / "model_index.json", INDEX)
    return folder


def save_adapter(path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for prefix, module, size in (("lora_unet_", UNET, 6), ("lora_te_", ENCODER, 4)):
        name = prefix + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, size, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(size, 2, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, path)
    return path


def make_run(base: Path, adapter: Path, run: Path, precision: Any = "fp32") -> Path:
    """What merge-and-export leaves of these, as far as packages and verification read it."""
    choice = AdapterChoice(adapter)
    merged = merge_pipeline(base, [choice], run / "merged", MergeOptions(), Silent())
    _export(run / "merged", run / "onnx", precision)
    checked = ValidationResult(checks=(Check("onnx_image_psnr", 118.0, 60.0, True),))
    story = Story(run, merged, validate=checked, export=load_export(run / "onnx"))
    options, source = StoryOptions(), Source(base.name, base)
    options = replace(options, export=replace(options.export, precision=precision, provider="cpu"))
    write_report(story, run, source, [choice], options)
    manifest.write(run, source, [choice], kept(options))
    return run


def picture(path: Path, seed: int = 0, side: int = 16) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def _export(pipeline: Path, folder: Path, precision: Any) -> None:
    """In Optimum's layout, each graph with a weight in a file beside it."""
    components = {}
    for name, source in GRAPHS.items():
        part = folder / name
        part.mkdir(parents=True)
        _graph(part / "model.onnx")
        (part / "config.json").write_bytes((pipeline / source / "config.json").read_bytes())
        record = ExportRecord(
            engine="diffusion", precision=precision, kind="component", nodes=1, seconds=1.0, part=name
        )
        records.write_record(part, record)
        digest = sealed.sha256(part / "export.json")
        components[name] = ComponentRecord(str(INDEX[source][1]), source, precision, 1, "", digest)
    for name in ("scheduler", "tokenizer"):
        (folder / name).mkdir()
        for path in (pipeline / name).iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
    (folder / "model_index.json").write_bytes((pipeline / "model_index.json").read_bytes())
    whole = ExportRecord(
        engine="diffusion", precision=precision, kind="pipeline", task="text-to-image", nodes=4, seconds=1.0,
        graphs=tuple(f"{name}/model.onnx" for name in GRAPHS), architecture="StableDiffusionPipeline",
        components=components,
    )  # fmt: skip
    records.write_record(folder, whole)


def _graph(path: Path) -> None:
    weight = numpy_helper.from_array(np.arange(64, dtype=np.float32), "weight")
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [64]) for n in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Add", ["x", "weight"], ["y"])], "part", [given], [made], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=0)


def _model(folder: Path, tensors: dict[str, torch.Tensor], name: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / name)
    _write(folder / "config.json", config)


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(document, indent=2))
