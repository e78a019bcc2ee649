"""Pipelines and adapter files of headers alone: shapes and types, and numbers that are zero."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.checkpoint.header import build_header

Shapes = Mapping[str, tuple[int, ...]]

UNET: Shapes = {
    "conv_in.weight": (8, 4, 3, 3),
    "conv_in.bias": (8,),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": (8,),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight": (8, 32),
}
CLIP: Shapes = {
    "text_model.embeddings.token_embedding.weight": (20, 6),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (6, 6),
    "text_model.encoder.layers.0.self_attn.q_proj.bias": (6,),
    "text_model.encoder.layers.0.mlp.fc1.weight": (12, 6),
}


def write_tensors(path: Path, shapes: Shapes, metadata: dict[str, str] | None = None, dtype: str = "F16") -> Path:
    """A safetensors file whose tensors are zero; the file is sparse, so any size costs nothing."""
    head = build_header([(name, dtype, shape) for name, shape in shapes.items()], metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + json.loads(head[8:])[list(shapes)[-1]]["data_offsets"][1])
    return path


def write_component(folder: Path, class_name: str, shapes: Shapes, variant: str = "", **config: Any) -> Path:
    """A model of diffusers, or of transformers where its class says so."""
    clip = class_name.startswith("CLIP")
    stem = "model" if clip else "diffusion_pytorch_model"
    write_tensors(folder / f"{stem}{variant and f'.{variant}'}.safetensors", shapes)
    of_clip = {"architectures": [class_name], "model_type": "clip_text_model"}
    named = of_clip if clip else {"_class_name": class_name}
    (folder / "config.json").write_text(json.dumps({**named, **config}))
    return folder


def write_pipeline(folder: Path, variant: str = "") -> Path:
    """A StableDiffusionPipeline of a UNet and a CLIP, with a scheduler and without a safety checker."""
    write_component(folder / "unet", "UNet2DConditionModel", UNET, variant, in_channels=4)
    write_component(folder / "text_encoder", "CLIPTextModel", CLIP, hidden_size=6, vocab_size=20)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
