"""Spellings of modules: a second opinion from diffusers' own converters, and what collides or is refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_export.adapters.diffusion.names import FAMILIES
from lora_export.adapters.diffusion.names.tables import Base
from lora_export.contracts import Piece

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A class of diffusers with the widths of the real model and few layers, and its converter of checkpoints in
    the original repository's names. scale: the weights of norms are called so there; prefix: of all names there."""

    name: str
    converter: str
    config: Mapping[str, Any] = field(default_factory=dict)
    scale: bool = False
    prefix: str = ""


FLUX = {"num_layers": 2, "num_single_layers": 2}
_UNET = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 8}
MODELS = {
    "sd": Model(
        "UNet2DConditionModel",
        "convert_ldm_unet_checkpoint",
        {**_UNET, "block_out_channels": (8, 8, 16, 16)},
        prefix="model.diffusion_model.",
    ),
    "sdxl": Model(
        "UNet2DConditionModel",
        "convert_ldm_unet_checkpoint",
        {
            **_UNET,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 3),
            "layers_per_block": 2,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "use_linear_projection": True,
        },
        prefix="model.diffusion_model.",
    ),
    "sd3": Model(
        "SD3Transformer2DModel",
        "convert_sd3_transformer_checkpoint_to_diffusers",
        {
            "num_layers": 3,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0, 1),
        },
    ),
    "flux": Model(
        "FluxTransformer2DModel",
        "convert_flux_transformer_checkpoint_to_diffusers",
        {**FLUX, "guidance_embeds": True},
        scale=True,
    ),
    "chroma": Model(
        "ChromaTransformer2DModel", "convert_chroma_transformer_checkpoint_to_diffusers", FLUX, scale=True
    ),
    "flux2": Model(
        "Flux2Transformer2DModel", "convert_flux2_transformer_checkpoint_to_diffusers", FLUX, scale=True
    ),
    "wan": Model(
        "WanTransformer3DModel",
        "convert_wan_transformer_to_diffusers",
        {"num_layers": 2, "image_dim": 8, "added_kv_proj_dim": 5120},
    ),
    "wan vace": Model(
        "WanVACETransformer3DModel",
        "convert_wan_transformer_to_diffusers",
        {"num_layers": 2, "vace_layers": [0, 1]},
    ),
    "hunyuan video": Model(
        "HunyuanVideoTransformer3DModel",
        "convert_hunyuan_video_transformer_to_diffusers",
        {**FLUX, "num_refiner_layers": 2},
    ),
    "lumina": Model(
        "Lumina2Transformer2DModel", "convert_lumina2_to_diffusers", {"num_layers": 2, "num_refiner_layers": 2}
    ),
    "z-image": Model(
        "ZImageTransformer2DModel",
        "convert_z_image_transformer_checkpoint_to_diffusers",
        {"n_layers": 2, "n_refiner_layers": 2},
    ),
    "ltx": Model(
        "LTXVideoTransformer3DModel", "convert_ltx_transformer_checkpoint_to_diffusers", {"num_layers": 2}
    ),
    "ltx2": Model("LTX2VideoTransformer3DModel", "convert_ltx2_transformer_to_diffusers", {"num_layers": 2}),
}


def thin(model: Model) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a model with all their rows and one column, all numbers different, and its configuration."""
    import diffusers

    with torch.device("meta"):
        made = getattr(diffusers, model.name)(**model.config)
    tensors: dict[str, Tensor] = {}
    at = 0
    for name, value in made.state_dict().items():
        shape = (value.shape[0], *[1] * (value.dim() - 1))
        tensors[name] = torch.arange(at, at + shape[0], dtype=torch.float64).reshape(shape)
        at += shape[0]
    return tensors, made.config


def base_of(name: str, tensors: Mapping[str, Tensor]) -> Base:
    return Base(name, {}, {n: tuple(t.shape) for n, t in tensors.items()})


def original(base: Base, tensors: Mapping[str, Tensor], scale: bool) -> dict[str, Tensor]:
    """A checkpoint in the original names, as the tables say: rows below each other, halves swapped back."""
    left, made = dict(tensors), {}
    for family in (f for f in FAMILIES if base.class_name in f.CLASSES):
        for spelling, pieces in family.spellings(base):
            if not all(any(k in left for k in keys_of(p)) for p in pieces):
                continue  # another spelling of it was taken
            for leaf in ("", ".weight", ".bias"):
                parts = [left.pop(f"{p.module}{leaf}", None) for p in pieces]
                if all(p is not None for p in parts):
                    whole = torch.cat([p for p in parts if p is not None])
                    if pieces[0].swap:
                        whole = whole.roll(len(whole) // 2, 0)
                    made[spelling + leaf] = whole
    found = made | left
    return {
        n.replace(".weight", ".scale") if scale and re.search(r"norms?\.", n) else n: t for n, t in found.items()
    }


def keys_of(piece: Piece) -> tuple[str, ...]:
    return (piece.module,) if piece.bare else (f"{piece.module}.weight", f"{piece.module}.bias")


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_original_names_of_a_family_are_what_diffusers_converts(family: str) -> None:
    from diffusers.loaders import single_file_utils

    model = MODELS[family]
    tensors, config = thin(model)
    checkpoint = original(base_of(model.name, tensors), tensors, model.scale)
    assert len(set(checkpoint) - set(tensors)) > 0.2 * len(checkpoint)
    checkpoint = {model.prefix + n: t for n, t in checkpoint.items()}
    converted = getattr(single_file_utils, model.converter)(checkpoint, config=config)
    converted = {n: t for n, t in converted.items() if t is not None}
    assert set(converted) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(converted[name], value), name
