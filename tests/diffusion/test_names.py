"""Spellings of modules: a second opinion from diffusers' own converters, and what collides or is refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_export.adapters.diffusion.names import FAMILIES, plain
from lora_export.adapters.diffusion.names.tables import Base, Pieces
from lora_export.contracts import Piece

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A class of diffusers with the widths of the real model and few layers, and its converter of checkpoints in
    the original names. scale: the weights of norms are called so there; prefix: of all names there; more: tensors
    that diffusers leaves out."""

    name: str
    converter: str
    config: Mapping[str, Any] = field(default_factory=dict)
    scale: bool = False
    prefix: str = ""
    more: tuple[str, ...] = ()


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
    # The converter counts on 48 layers.
    "mochi": Model("MochiTransformer3DModel", "convert_mochi_transformer_checkpoint_to_diffusers"),
    "auraflow": Model(
        "AuraFlowTransformer2DModel",
        "convert_auraflow_transformer_checkpoint_to_diffusers",
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
    ),
    "sana": Model(
        "SanaTransformer2DModel",
        "convert_sana_transformer_to_diffusers",
        {"num_layers": 2},
        more=("pos_embed", "y_embedder.y_embedding"),
    ),
    "cosmos": Model(
        "CosmosTransformer3DModel",
        "convert_cosmos_transformer_checkpoint_to_diffusers",
        {"num_layers": 2, "extra_pos_embed_type": None},
        prefix="net.",
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
    checkpoint |= {n: torch.zeros(1) for n in model.more}
    converted = getattr(single_file_utils, model.converter)(checkpoint, config=config)
    converted = {n: t for n, t in converted.items() if t is not None}
    assert set(converted) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(converted[name], value), name


@dataclass(frozen=True)
class Convention:
    """Files of a trainer, and diffusers' converter of them. prefix: of a module's name; flat: dots are underscores;
    but: spellings that the converter does not know, or gets wrong."""

    model: Model
    converter: str
    flat: bool = False
    but: str = r"^$"

    def named(self, spelling: str) -> str:
        return f"lora_unet_{spelling.replace('.', '_')}" if self.flat else f"diffusion_model.{spelling}"


QWEN = Model("QwenImageTransformer2DModel", "", {"num_layers": 2})
_BLOCKS = r"^(?!blocks\.)"
CONVENTIONS = {
    "wan of musubi": Convention(MODELS["wan"], "_convert_musubi_wan_lora_to_diffusers", True, _BLOCKS),
    "wan": Convention(MODELS["wan"], "_convert_non_diffusers_wan_lora_to_diffusers"),
    # It cuts the shared factor of the refiner's qkv in three, as if it had the rows of q, k and v, and swaps the
    # halves of the last modulation in both factors.
    "hunyuan": Convention(
        MODELS["hunyuan video"], "_convert_hunyuan_video_lora_to_diffusers", but=r"self_attn_qkv|final_layer\.adaLN"
    ),
    "lumina": Convention(
        MODELS["lumina"], "_convert_non_diffusers_lumina2_lora_to_diffusers", but=r"_embedder|final_layer"
    ),
    # The converter of whole checkpoints swaps the halves of the last modulation; that of adapters forgets to.
    "flux2": Convention(
        MODELS["flux2"], "_convert_non_diffusers_flux2_lora_to_diffusers", but=r"final_layer\.adaLN"
    ),
    "flux2 of kohya": Convention(
        MODELS["flux2"], "_convert_kohya_flux2_lora_to_diffusers", True, r"_modulation|guidance_in"
    ),
    "z-image of kohya": Convention(
        MODELS["z-image"], "_convert_non_diffusers_z_image_lora_to_diffusers", True, r"^(x_embedder|final_layer)"
    ),
    "ltx2": Convention(MODELS["ltx2"], "_convert_non_diffusers_ltx2_lora_to_diffusers"),
    "qwen": Convention(QWEN, "_convert_non_diffusers_qwen_lora_to_diffusers"),
    "qwen of kohya": Convention(QWEN, "_convert_non_diffusers_qwen_lora_to_diffusers", True),
}


def matrices(base: Base) -> list[tuple[str, Pieces]]:
    """One spelling for each matrix of a base: a family's, where it has one."""
    families = [f for f in FAMILIES if base.class_name in f.CLASSES]
    taken: set[str] = set()
    found = []
    for spelling, pieces in [s for f in [*families, plain] for s in f.spellings(base)]:
        modules = {p.module for p in pieces}
        flat = any(len(base.shapes.get(f"{m}.weight", ())) != 2 for m in modules)
        if not flat and not modules & taken:
            taken |= modules
            found.append((spelling, pieces))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVENTIONS)
def test_names_of_a_trainer_are_what_diffusers_converts(name: str) -> None:
    from diffusers.loaders import lora_conversion_utils

    convention = CONVENTIONS[name]
    weights, _ = thin(convention.model)
    file: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for spelling, pieces in matrices(base_of(convention.model.name, weights)):
        if re.search(convention.but, spelling):
            continue
        module = convention.named(spelling)
        down, up = ("lora_down", "lora_up") if convention.flat else ("lora_A", "lora_B")
        parts = [weights[f"{p.module}.weight"] for p in pieces]
        whole = torch.cat([p.roll(len(p) // 2, 0) if pieces[0].swap else p for p in parts])
        file[f"{module}.{down}.weight"], file[f"{module}.{up}.weight"] = torch.ones(1, 1).double(), whole
        if convention.flat:
            file[f"{module}.alpha"] = torch.tensor(1.0)
        expected |= {f"transformer.{p.module}.lora_B.weight": w for p, w in zip(pieces, parts, strict=True)}
    assert len(expected) > 10
    converted = getattr(lora_conversion_utils, convention.converter)(dict(file))
    ups = {n: t for n, t in converted.items() if ".lora_B." in n}
    assert set(ups) == set(expected)
    for key, value in expected.items():
        assert torch.equal(ups[key], value), key
