"""Files of adapters understood: who wrote them, where each module lies, its alpha, and what is refused."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_export.adapters.diffusion.reading import component_of, understand
from lora_export.adapters.kind import AdapterFile
from lora_export.checkpoint.adapter_files import open_adapter_files, open_single_file
from lora_export.contracts import Component, DiffusionAdapter, Piece, Pipeline
from lora_export.errors import AdapterError
from tests.diffusion.made import write_tensors

Shapes = dict[str, tuple[int, ...]]
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET: Shapes = {
    "conv_in.weight": (8, 4, 3, 3),
    f"{ATTENTION}.attn1.to_q.weight": (8, 8),
    f"{ATTENTION}.attn1.to_out.0.weight": (8, 8),
    f"{ATTENTION}.ff.net.2.weight": (8, 32),
    "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
    "up_blocks.0.resnets.0.time_emb_proj.weight": (8, 16),
    "up_blocks.0.upsamplers.0.conv.weight": (8, 8, 3, 3),
}


def clip(width: int, prefix: str = "text_model.") -> Shapes:
    return {
        f"{prefix}embeddings.token_embedding.weight": (20, width),
        f"{prefix}encoder.layers.0.self_attn.q_proj.weight": (width, width),
        f"{prefix}encoder.layers.0.self_attn.out_proj.weight": (width, width),
        f"{prefix}encoder.layers.0.mlp.fc1.weight": (4 * width, width),
    }


T5: Shapes = {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 10), "shared.weight": (30, 10)}
FLUX: Shapes = {
    **{f"transformer_blocks.0.attn.{n}.weight": (8, 8) for n in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"transformer_blocks.0.attn.add_{n}_proj.weight": (8, 8) for n in "qkv"},
    "transformer_blocks.0.attn.norm_q.weight": (4,),
    **{f"single_transformer_blocks.0.attn.to_{n}.weight": (8, 8) for n in "qkv"},
    "single_transformer_blocks.0.proj_mlp.weight": (32, 8),
    "single_transformer_blocks.0.proj_out.weight": (8, 40),
    "x_embedder.weight": (8, 4),
    "norm_out.linear.weight": (16, 8),
}
SD3: Shapes = {
    **{f"transformer_blocks.{i}.norm1_context.linear.weight": (48 - 32 * i, 8) for i in (0, 1)},
    **{f"transformer_blocks.0.{a}.to_{n}.weight": (8, 8) for a in ("attn", "attn2") for n in "qkv"},
}
WAN: Shapes = {
    "blocks.0.attn1.to_q.weight": (8, 8),
    "blocks.0.scale_shift_table": (1, 6, 8),
    "blocks.0.norm2.weight": (8,),
    "scale_shift_table": (1, 2, 8),
}
LUMINA: Shapes = {f"layers.0.attn.to_{n}.weight": (rows, 8) for n, rows in (("q", 8), ("k", 4), ("v", 4))}
BASES: dict[str, tuple[str, dict[str, tuple[str, Shapes]]]] = {
    "sd": (
        "StableDiffusionPipeline",
        {"text_encoder": ("CLIPTextModel", clip(6)), "unet": ("UNet2DConditionModel", UNET)},
    ),
    "sd new": (  # as transformers 5.6 writes a text encoder that was built anew
        "StableDiffusionPipeline",
        {"text_encoder": ("CLIPTextModel", clip(6, "")), "unet": ("UNet2DConditionModel", UNET)},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "text_encoder": ("CLIPTextModel", clip(6)),
            "text_encoder_2": ("CLIPTextModelWithProjection", clip(10) | {"text_projection.weight": (10, 10)}),
            "unet": ("UNet2DConditionModel", UNET),
        },
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        {
            "text_encoder": ("CLIPTextModelWithProjection", clip(6)),
            "text_encoder_2": ("CLIPTextModelWithProjection", clip(10)),
            "text_encoder_3": ("T5EncoderModel", T5),
            "transformer": ("SD3Transformer2DModel", SD3),
        },
    ),
    "flux": (
        "FluxPipeline",
        {
            "text_encoder": ("CLIPTextModel", clip(6)),
            "text_encoder_2": ("T5EncoderModel", T5),
            "transformer": ("FluxTransformer2DModel", FLUX),
        },
    ),
    "wan": ("WanPipeline", {"transformer": ("WanTransformer3DModel", WAN)}),
    "wan 2.2": (
        "WanPipeline",
        {"transformer": ("WanTransformer3DModel", WAN), "transformer_2": ("WanTransformer3DModel", WAN)},
    ),
    "lumina": ("Lumina2Pipeline", {"transformer": ("Lumina2Transformer2DModel", LUMINA)}),
}


def base_of(name: str) -> tuple[Pipeline, dict[str, Shapes]]:
    class_name, parts = BASES[name]
    folder = Path(f"/bases/{name}")
    components = {c: Component(c, folder / c, "diffusers", cls, {}) for c, (cls, _) in parts.items()}
    return Pipeline(folder, class_name, components), {c: s for c, (_, s) in parts.items()}


def read(
    base: str, path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None, split: Any = None
) -> DiffusionAdapter:
    """tensors: shapes of zeros, or values."""
    if any(isinstance(t, Tensor) for t in tensors.values()):
        values = {n: t if isinstance(t, Tensor) else torch.ones(t) for n, t in tensors.items()}
        save_file(values, path, metadata)
    else:
        write_tensors(path, dict(tensors), metadata)
    pipeline, shapes = base_of(base)
    source, told = open_single_file(path)
    return understand(AdapterFile(source, {}, path), told, pipeline, shapes, split)


def pair(spelling: str, rows: int = 8, columns: int = 8, rank: int = 2) -> dict[str, Any]:
    return {f"{spelling}.lora_down.weight": (rank, columns), f"{spelling}.lora_up.weight": (rows, rank)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "style.safetensors"


QKV = ("to_q", "to_k", "to_v")
TO_Q = f"{ATTENTION}.attn1.to_q"
IMAGE = [Piece(f"transformer_blocks.0.attn.{n}", (8 * i, 8 * i + 8)) for i, n in enumerate(QKV)]
TEXT = [Piece(f"transformer_blocks.0.attn.add_{n}_proj", (8 * i, 8 * i + 8)) for i, n in enumerate("qkv")]
SINGLE = [Piece(f"single_transformer_blocks.0.attn.{n}", (8 * i, 8 * i + 8)) for i, n in enumerate(QKV)]
ENCODER = "text_model.encoder.layers.0"
Q_PROJ = f"{ENCODER}.self_attn.q_proj"
T5_Q = "encoder.block.0.layer.0.SelfAttention.q"
DOWN, A, DEFAULT = ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight"
PLACES: list[tuple[str, str, str, str | Sequence[Piece]]] = [
    # base, name of the down factor, component, module or pieces
    ("sd", f"lora_unet_{TO_Q.replace('.', '_')}{DOWN}", "unet", TO_Q),
    ("sd", f"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q{DOWN}", "unet", TO_Q),
    ("sd", f"lora_unet_input_blocks_1_0_in_layers_2{DOWN}", "unet", "down_blocks.0.resnets.0.conv1"),
    ("sd", f"lora_unet_input_blocks_0_0{DOWN}", "unet", "conv_in"),
    ("sd", f"lora_unet_output_blocks_0_0_emb_layers_1{DOWN}", "unet", "up_blocks.0.resnets.0.time_emb_proj"),
    ("sd", f"lora_unet_output_blocks_0_1_conv{DOWN}", "unet", "up_blocks.0.upsamplers.0.conv"),
    ("sd", f"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q{DOWN}", "unet", TO_Q),
    ("sd", f"lycoris_{TO_Q.replace('.', '_')}.hada_w1_a", "unet", TO_Q),
    ("sd", f"lycoris_{Q_PROJ.replace('.', '_')}.hada_w1_a", "text_encoder", Q_PROJ),
    ("sd", f"oft_unet_{TO_Q.replace('.', '_')}.oft_blocks", "unet", TO_Q),
    ("sd", f"unet.{TO_Q}{A}", "unet", TO_Q),
    ("sd", f"unet.base_model.model.{TO_Q}{DEFAULT}", "unet", TO_Q),
    ("sd", f"{TO_Q}.lora_A", "unet", TO_Q),
    ("sd", f"base_model.model.{TO_Q}.lora_A.style.weight", "unet", TO_Q),
    ("sd", f"unet.{TO_Q}.lora.down.weight", "unet", TO_Q),
    ("sd", f"unet.{ATTENTION}.attn1.processor.to_q_lora.down.weight", "unet", TO_Q),
    ("sd", f"{ATTENTION}.attn1.processor.to_out_lora.down.weight", "unet", f"{ATTENTION}.attn1.to_out.0"),
    ("sd", f"lora_te_{Q_PROJ.replace('.', '_')}{DOWN}", "text_encoder", Q_PROJ),
    ("sd", f"lora_te1_{Q_PROJ.replace('.', '_')}{DOWN}", "text_encoder", Q_PROJ),
    ("sd", f"text_encoder.{Q_PROJ}.lora_linear_layer.down.weight", "text_encoder", Q_PROJ),
    ("sd", f"text_encoder.{ENCODER}.self_attn.to_q_lora.down.weight", "text_encoder", Q_PROJ),
    ("sd", f"text_encoder.{Q_PROJ}.to_q_lora.down.weight", "text_encoder", Q_PROJ),
    ("sd", f"{Q_PROJ}{A}", "text_encoder", Q_PROJ),
    ("sd", f"clip_h.transformer.{Q_PROJ}{DOWN}", "text_encoder", Q_PROJ),
    ("sd", f"text_encoder.encoder.layers.0.self_attn.q_proj{A}", "text_encoder", Q_PROJ),
    ("sd new", f"lora_te_{Q_PROJ.replace('.', '_')}{DOWN}", "text_encoder", Q_PROJ.removeprefix("text_model.")),
    ("sdxl", f"lora_te2_{Q_PROJ.replace('.', '_')}{DOWN}", "text_encoder_2", Q_PROJ),
    ("sdxl", f"lora_te2_text_projection{DOWN}", "text_encoder_2", "text_projection"),
    ("sdxl", f"text_encoders.clip_l.transformer.{Q_PROJ}{DOWN}", "text_encoder", Q_PROJ),
    ("sdxl", f"text_encoders.clip_g.transformer.{Q_PROJ}{DOWN}", "text_encoder_2", Q_PROJ),
    ("sdxl", f"clip_g.transformer.{Q_PROJ}{DOWN}", "text_encoder_2", Q_PROJ),
    ("sdxl", f"conditioner.embedders.0.transformer.{Q_PROJ}{DOWN}", "text_encoder", Q_PROJ),
    ("sd3", f"lora_te3_{T5_Q.replace('.', '_')}{DOWN}", "text_encoder_3", T5_Q),
    ("sd3", f"lora_te2_{Q_PROJ.replace('.', '_')}{DOWN}", "text_encoder_2", Q_PROJ),
    (
        "sd3",
        f"lora_unet_joint_blocks_0_context_block_adaLN_modulation_1{DOWN}",
        "transformer",
        "transformer_blocks.0.norm1_context.linear",
    ),
    (
        "sd3",
        f"lora_unet_joint_blocks_1_context_block_adaLN_modulation_1{DOWN}",
        "transformer",
        [Piece("transformer_blocks.1.norm1_context.linear", swap=True)],
    ),
    (
        "sd3",
        f"diffusion_model.joint_blocks.0.x_block.attn2.qkv{A}",
        "transformer",
        [Piece(f"transformer_blocks.0.attn2.{n}", (8 * i, 8 * i + 8)) for i, n in enumerate(QKV)],
    ),
    ("flux", f"lora_te3_{T5_Q.replace('.', '_')}{DOWN}", "text_encoder_2", T5_Q),
    ("flux", f"lora_te2_{T5_Q.replace('.', '_')}{DOWN}", "text_encoder_2", T5_Q),
    ("flux", f"text_encoders.t5xxl.transformer.{T5_Q}{DOWN}", "text_encoder_2", T5_Q),
    ("flux", f"text_encoder_2.encoder.embed_tokens{DOWN}", "text_encoder_2", "shared"),
    ("flux", f"lora_unet_double_blocks_0_img_attn_qkv{DOWN}", "transformer", IMAGE),
    ("flux", f"lora_transformer_transformer_blocks_0_attn_to_q{DOWN}", "transformer", IMAGE[0].module),
    ("flux", f"transformer.double_blocks.0.txt_attn.qkv{A}", "transformer", TEXT),
    ("flux", f"base_model.model.double_blocks.0.img_attn.qkv{A}", "transformer", IMAGE),
    ("flux", "double_blocks.0.processor.qkv_lora1.down.weight", "transformer", IMAGE),
    ("flux", "double_blocks.0.processor.qkv_lora2.down.weight", "transformer", TEXT),
    (
        "flux",
        "diffusion_model.double_blocks.0.processor.proj_lora1.down.weight",
        "transformer",
        "transformer_blocks.0.attn.to_out.0",
    ),
    ("flux", "single_blocks.0.processor.qkv_lora.down.weight", "transformer", SINGLE),
    (
        "flux",
        "single_blocks.0.processor.proj_lora.down.weight",
        "transformer",
        "single_transformer_blocks.0.proj_out",
    ),
    (
        "flux",
        f"single_blocks.0.linear1{A}",
        "transformer",
        [*SINGLE, Piece("single_transformer_blocks.0.proj_mlp", (24, 56))],
    ),
    (
        "flux",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "transformer",
        "transformer_blocks.0.attn.norm_q",
    ),
    ("flux", f"lora_unet_img_in{DOWN}", "transformer", "x_embedder"),
    (
        "flux",
        f"lora_unet_final_layer_adaLN_modulation_1{DOWN}",
        "transformer",
        [Piece("norm_out.linear", swap=True)],
    ),
    ("flux", f"lora_unet_transformer_blocks_0_attn_to_q_{DOWN}", "transformer", IMAGE[0].module),
    ("flux", f"lycoris__orig_mod_transformer_blocks_0_attn_to_q{DOWN}", "transformer", IMAGE[0].module),
    ("flux", f"transformer._orig_mod.transformer_blocks.0._orig_mod.attn.to_q{A}", "transformer", IMAGE[0].module),
    ("wan", f"lora_unet__blocks_0_self_attn_q{DOWN}", "transformer", "blocks.0.attn1.to_q"),
    ("wan", f"pipe.dit.blocks.0.self_attn.q{DEFAULT}", "transformer", "blocks.0.attn1.to_q"),
    ("wan", "diffusion_model.blocks.0.norm3.diff", "transformer", "blocks.0.norm2"),
    ("wan", "diffusion_model.blocks.0.diff_m", "transformer", [Piece("blocks.0.scale_shift_table", bare=True)]),
    ("wan", "lora_unet_blocks_0.diff_m", "transformer", [Piece("blocks.0.scale_shift_table", bare=True)]),
    ("wan", "diffusion_model.head.modulation.diff", "transformer", [Piece("scale_shift_table", bare=True)]),
    ("wan 2.2", f"transformer_2.blocks.0.attn1.to_q{A}", "transformer_2", "blocks.0.attn1.to_q"),
    (
        "lumina",
        f"lora_unet_layers_0_attention_qkv{DOWN}",
        "transformer",
        [Piece(f"layers.0.attn.{n}", rows) for n, rows in zip(QKV, ((0, 8), (8, 12), (12, 16)), strict=True)],
    ),
]
_OTHERS = [("lora_A", "lora_B"), ("lora_down", "lora_up"), (".down.weight", ".up.weight")]


@pytest.mark.parametrize("base,name,component,where", PLACES)
def test_understand_of_a_spelling_finds_the_weight(
    base: str, name: str, component: str, where: str | Sequence[Piece], path: Path
) -> None:
    rows = where[-1].rows[1] if not isinstance(where, str) and where[-1].rows else 8
    tensors: dict[str, tuple[int, ...]] = {name: (2, 8)}
    for down, up in _OTHERS:
        if down in name:
            tensors[name.replace(down, up)] = (rows, 2)
    if "hada" in name:
        tensors |= {name.replace("w1_a", part): (2, 8) for part in ("w1_b", "w2_a", "w2_b")}
    (module,) = read(base, path, tensors).modules
    assert module.component == component
    assert module.pieces == ((Piece(where),) if isinstance(where, str) else tuple(where))
    assert sorted(module.keys.values()) == sorted(tensors)


LORA = f"lora_unet_{TO_Q.replace('.', '_')}"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # base, tensors, what the refusal says
    (
        "sd",
        pair(f"lora_te2_{Q_PROJ.replace('.', '_')}", 6, 6),
        "^lora_te2_: this adapter has a second text encoder, the base StableDiffusionPipeline has one$",
    ),
    ("sd", pair(f"transformer.{TO_Q}"), "^transformer.: this adapter has tensors for a transformer"),
    ("sdxl", pair(f"lora_te3_{T5_Q.replace('.', '_')}"), "third text encoder, the base .* has two"),
    ("sdxl", pair(f"text_encoders.t5xxl.transformer.{T5_Q}"), "a text encoder t5xxl"),
    ("sdxl", pair(f"lora_te_{Q_PROJ.replace('.', '_')}", 6, 6), "means several weights: text_encoder"),
    ("wan 2.2", pair("diffusion_model.blocks.0.self_attn.q"), "means several weights: transformer.blocks"),
    ("sd", pair(f"{LORA}x") | pair(LORA), "^1 of 2 modules of this adapter find no weight in unet"),
    ("sd", pair("lora_unet_double_blocks_0_img_attn_qkv"), "^none of the 1 modules of this adapter is in unet"),
    ("sd", pair(LORA) | pair(f"unet.{TO_Q}"), "two spellings of one weight, unet.down_blocks"),
    (
        "flux",
        pair("double_blocks.0.img_attn.qkv", 24) | pair("transformer.transformer_blocks.0.attn.to_k"),
        "two spellings of one weight, transformer.transformer_blocks.0.attn.to_k",
    ),
    ("sd", {f"{LORA}.lora_down.weight": (2, 8)}, "has lora_down without lora_up"),
    ("sd", {f"{LORA}.lora_up.weight": (8, 2)}, "has lora_up without lora_down"),
    ("sd", {f"{LORA}.alpha": ()}, "has alpha without the factors"),
    ("sd", {f"{LORA}.dora_scale": (8, 1)}, "has dora_scale without lora_down, lora_up"),
    ("sd", {f"{LORA}.hada_w1_a": (8, 2), f"{LORA}.hada_w1_b": (2, 8)}, "has hada_w1_a without hada_w2_a"),
    ("sd", {f"{LORA}.lokr_w1": (2, 2)}, "has no factor 2"),
    (
        "sd",
        {f"{LORA}.{n}": (2, 2) for n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2")},
        "has both a whole and a decomposed factor 1",
    ),
    ("sd", pair(LORA) | {f"{LORA}.oft_blocks": (2, 4, 4)}, "has tensors of LoRA and OFT"),
    ("sd", pair(LORA) | {f"{LORA}.lora_A.weight": (2, 8)}, "two tensors have the same meaning"),
    (
        "sd",
        {f"unet.{TO_Q}.lora_{m}.{n}.weight": (2, 2) for m, n in (("A", "one"), ("B", "two"))},
        "several adapters: one, two",
    ),
    ("sd", pair(LORA) | {f"{LORA}.lora_sideways": (2, 2)}, "ending that no kind of adapter has"),
    ("sd", pair(LORA) | {f"unet.{TO_Q}.weight": (8, 8)}, "whole weights, not differences"),
    ("sd", pair(LORA) | {"lora_unet_conv_in.diff": (0, 4)}, "the tensor is empty"),
    ("flux", pair("lora_unet_double_blocks_0_img_attn_qkv", 21), r"has 24 rows in the base: transformer_blocks.0"),
    ("sd", {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)}, "an IP-Adapter"),
    ("sd", {"lora_controlnet": (0 + 1,), "input_blocks.0.0.weight": (8, 4, 3, 3)}, "a control-LoRA"),
    ("sd", {"lllite_unet_input_blocks_4_1.down.0.weight": (8, 8)}, "ControlNet-LLLite"),
    ("sd", {"control_model.input_hint_block.0.weight": (8, 8)}, "a ControlNet"),
    ("sd", {"768.0.linear.0.weight": (8, 8)}, "a hypernetwork"),
    ("sd", {"prompt_embeddings": (8, 8)}, "prompt embeddings"),
    ("sd", {f"base_model.model.{TO_Q}.ia3_l": (8, 1)}, "without its adapter_config.json"),
    ("sd", {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "a whole checkpoint"),
]


@pytest.mark.parametrize("base,tensors,message", REFUSED, ids=[m for _, _, m in REFUSED])
def test_understand_of_what_nothing_can_mean_is_refused_by_name(
    base: str, tensors: dict[str, Any], message: str, path: Path
) -> None:
    with pytest.raises(AdapterError) as refused:
        read(base, path, tensors)
    assert re.search(message, refused.value.found), refused.value.found
    assert refused.value.where == str(path)
    if "several adapters" not in message:
        assert refused.value.tensor in tensors


def test_understand_of_a_flattened_name_of_two_weights_is_refused(path: Path) -> None:
    """`a.b_c` and `a_b.c` flatten to one name, which cannot be computed back."""
    twins = UNET | {"mid_block.to_q.weight": (8, 8), "mid.block_to_q.weight": (8, 8)}
    write_tensors(path, pair("lora_unet_mid_block_to_q"))
    pipeline, shapes = base_of("sd")
    source, _ = open_single_file(path)
    with pytest.raises(AdapterError, match=r"unet\.mid_block\.to_q, unet\.mid\.block_to_q"):
        understand(AdapterFile(source, {}, path), {}, pipeline, {**shapes, "unet": twins}, None)


def test_unknown_name_of_a_module_suggests_the_closest(path: Path) -> None:
    with pytest.raises(AdapterError) as refused:
        read("sd", path, pair(f"unet.{ATTENTION}.attn3.to_q") | pair(LORA))
    assert f"the base has unet.{TO_Q}" in str(refused.value.expected)


@pytest.mark.parametrize("ending", ["_lora.{}.weight", ".lora.{}.weight", ".lora_linear_layer.{}.weight"])
def test_alpha_beside_the_first_lora_layers_belongs_to_them(ending: str, path: Path) -> None:
    name = f"unet.{ATTENTION}.attn1.processor.to_q"
    tensors: dict[str, Any] = {name + ending.format(n): s for n, s in (("down", (2, 8)), ("up", (8, 2)))}
    tensors[f"{name}{ending.partition('.{}')[0]}.alpha"] = torch.tensor(3.0)
    (module,) = read("sd", path, tensors).modules
    assert module.alpha == 3


ALPHAS: list[tuple[Tensor, float]] = [
    (torch.tensor(4.0), 4.0),
    (torch.tensor([0.7], dtype=torch.bfloat16), 0.69921875),
    (torch.tensor(0.7, dtype=torch.float16), 0.7001953125),
    (torch.tensor(0.1, dtype=torch.float64), 0.1),
    (torch.tensor(16), 16.0),
]


@pytest.mark.parametrize("tensor,alpha", ALPHAS)
def test_alpha_of_each_type_is_read_as_stored(tensor: Tensor, alpha: float, path: Path) -> None:
    (module,) = read("sd", path, pair(LORA) | {f"{LORA}.alpha": tensor}).modules
    assert (module.alpha, module.alpha_key) == (alpha, f"{LORA}.alpha")


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_alpha_that_nothing_can_mean_is_refused(alpha: float, path: Path) -> None:
    with pytest.raises(AdapterError, match="alpha is"):
        read("sd", path, pair(LORA) | {f"{LORA}.alpha": torch.tensor(alpha)})


def test_alpha_of_two_numbers_is_refused(path: Path) -> None:
    with pytest.raises(AdapterError, match=r"the shape of alpha is \[2\]"):
        read("sd", path, pair(LORA) | {f"{LORA}.alpha": torch.ones(2)})


def test_alpha_zero_with_a_factor_of_zeros_is_a_warning(path: Path) -> None:
    zeros = {f"{LORA}.lora_up.weight": torch.zeros(8, 2), f"{LORA}.alpha": torch.tensor(0.0)}
    adapter = read("sd", path, pair(LORA) | zeros)
    assert adapter.modules[0].alpha is None
    assert adapter.warnings == ("alpha is 0 in modules whose factors are zero: they change nothing",)


def test_alpha_zero_of_oft_is_its_constraint(path: Path) -> None:
    blocks = {f"{LORA}.oft_blocks": torch.ones(2, 4, 4), f"{LORA}.alpha": torch.tensor(0.0)}
    assert read("sd", path, blocks).modules[0].alpha == 0


def peft(**more: Any) -> dict[str, str]:
    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA"} | more
    return {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}


METADATA: list[tuple[dict[str, str], float | None]] = [
    ({}, None),
    (peft(), 4.0),
    (peft(use_rslora=True), 4 * math.sqrt(2)),
    (peft(alpha_pattern={"attn1.to_q": 1}), 1.0),
    (peft(r=8, rank_pattern={r"down_blocks\.0.*": 2}), 4.0),
    ({"unet.lora_alpha": "6", "unet.r": "2", "unet.use_rslora": "False"}, 6.0),
    ({"alpha": "8"}, 8.0),
    ({"ss_network_alpha": "1", "ss_network_dim": "2", "ss_network_args": "[" * 100_000}, None),
]


@pytest.mark.parametrize("metadata,alpha", METADATA)
def test_alpha_of_the_metadata_counts_where_no_tensor_says_it(
    metadata: dict[str, str], alpha: float | None, path: Path
) -> None:
    (module,) = read("sd", path, pair(f"unet.{TO_Q}"), metadata).modules
    assert module.alpha == pytest.approx(alpha) and module.alpha_key is None


def test_alpha_of_pefts_lokr_is_its_own_and_refused_for_whole_factors(path: Path) -> None:
    told = {"unet.r": 2, "unet.alpha": 6, "unet.peft_type": "LOKR"}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    name = f"unet.{TO_Q}"
    split = {f"{name}.lokr_w1": (2, 2), f"{name}.lokr_w2_a": (4, 2), f"{name}.lokr_w2_b": (2, 4)}
    assert read("sd", path, split, metadata).modules[0].alpha == 6
    with pytest.raises(AdapterError, match="PEFT scales this module by 6/2"):
        read("sd", path, {f"{name}.lokr_w1": (2, 2), f"{name}.lokr_w2": (4, 4)}, metadata)


BAD_METADATA = [
    ({"lora_adapter_metadata": "[1]"}, "no JSON object"),
    ({"lora_adapter_metadata": "[" * 100_000}, "no JSON object"),
    ({"unet.lora_alpha": "[" * 100_000, "unet.r": "2"}, "lora_alpha is"),
    (peft(r=4), "the configuration gives this module rank 4"),
    (peft(init_lora_weights="pissa"), "trained from pissa"),
    ({"alpha": "-2"}, "the metadata alpha is '-2'"),
    ({"alpha": "nan"}, "the metadata alpha is 'nan'"),
]


@pytest.mark.parametrize("metadata,message", BAD_METADATA)
def test_metadata_that_contradicts_the_file_is_refused(metadata: dict[str, str], message: str, path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        read("sd", path, pair(f"unet.{TO_Q}"), metadata)


def test_alpha_in_the_tensor_and_another_in_the_metadata_is_refused(path: Path) -> None:
    tensors = pair(f"unet.{TO_Q}") | {f"unet.{TO_Q}.alpha": torch.tensor(2.0)}
    with pytest.raises(AdapterError, match="alpha is 2 in the tensor and 4 in the metadata"):
        read("sd", path, tensors, peft())


SPLIT = {"ss_network_args": json.dumps({"split_qkv": "True"})}
FUSED = "lora_unet_double_blocks_0_img_attn_qkv"
FOURFOLD = "lora_unet_single_blocks_0_linear1"


@pytest.mark.parametrize(
    "split,alpha,found", [("trained", 2.0, 6.0), ("file", 2.0, 2.0), (None, 6.0, 6.0), ("trained", 6.0, 6.0)]
)
def test_alpha_of_a_split_qkv_is_that_of_training_if_so_told(
    split: str | None, alpha: float, found: float, path: Path
) -> None:
    tensors = pair(FUSED, 24, rank=6) | {f"{FUSED}.alpha": torch.tensor(alpha)}
    assert read("flux", path, tensors, SPLIT, split).modules[0].alpha == found


def test_alpha_of_a_split_single_block_is_four_times_the_files(path: Path) -> None:
    tensors = pair(FOURFOLD, 56, rank=8) | {f"{FOURFOLD}.alpha": torch.tensor(2.0)}
    assert read("flux", path, tensors, SPLIT, "trained").modules[0].alpha == 8


@pytest.mark.parametrize(
    "rank,split,message", [(6, None, "3 times smaller than the training's"), (7, "trained", "is not 3 times")]
)
def test_split_qkv_without_an_answer_or_of_another_rank_is_refused(
    rank: int, split: str | None, message: str, path: Path
) -> None:
    tensors = pair(FUSED, 24, rank=rank) | {f"{FUSED}.alpha": torch.tensor(2.0)}
    with pytest.raises(AdapterError, match=message):
        read("flux", path, tensors, SPLIT, split)


def test_leftovers_of_diffusers_first_text_encoders_are_zeros_or_refused(path: Path) -> None:
    """Each projection has four LoRAs there, of which one was trained and applied."""
    name = f"text_encoder.{Q_PROJ}.to_"
    used = {f"{name}q_lora.down.weight": (2, 6), f"{name}q_lora.up.weight": torch.ones(6, 2)}
    unused = {f"{name}k_lora.down.weight": (2, 6), f"{name}k_lora.up.weight": torch.zeros(6, 2)}
    adapter = read("sd", path, used | unused)
    assert [m.keys["lora_up"] for m in adapter.modules] == [f"{name}q_lora.up.weight"]
    assert adapter.unused == tuple(unused)
    assert adapter.warnings == ("2 tensors belong to factors of zeros that no tool applies",)
    with pytest.raises(AdapterError, match="never applied, and is not zero"):
        read("sd", path, used | unused | {f"{name}k_lora.up.weight": torch.ones(6, 2)})


VECTORS: list[dict[str, tuple[int, ...]]] = [
    {"bundle_emb.cat.string_to_param.*": (2, 6)},
    {"string_to_param.*": (2, 6)},
    {"clip_l": (2, 6), "clip_g": (2, 10)},
    {"emb_params": (2, 6)},
    {"<cat>": (6,)},
    {"cat-toy": (1, 6)},
]


@pytest.mark.parametrize("tensors", VECTORS)
def test_vectors_of_textual_inversion_are_no_weights(tensors: dict[str, tuple[int, ...]], path: Path) -> None:
    adapter = read("sd", path, tensors)
    assert (adapter.modules, sorted(adapter.vectors)) == ((), sorted(tensors))


def test_vectors_beside_weights_are_told_apart(path: Path) -> None:
    adapter = read("sd", path, pair(LORA) | {"bundle_emb.cat.string_to_param.*": (2, 6)})
    assert (len(adapter.modules), adapter.vectors) == (1, ("bundle_emb.cat.string_to_param.*",))
    with pytest.raises(AdapterError, match="ending that no kind"):
        read("sd", path, pair(LORA) | {"cat": (2, 6)})


FORMATS = [
    ("sd", LORA, "kohya"),
    ("sd", f"lycoris_{TO_Q.replace('.', '_')}", "lycoris"),
    ("sd", f"unet.{TO_Q}", "diffusers"),
    ("sd", f"base_model.model.{TO_Q}", "peft"),
    ("flux", "lora_transformer_transformer_blocks_0_attn_to_q", "onetrainer"),
    ("flux", "diffusion_model.transformer_blocks.0.attn.to_q", "original"),
    ("wan", "diffusion_model.blocks.0.self_attn.q", "original"),
]


@pytest.mark.parametrize("base,spelling,name", FORMATS)
def test_format_is_told_by_the_names(base: str, spelling: str, name: str, path: Path) -> None:
    assert read(base, path, pair(spelling)).format == name


def folder_of(tmp_path: Path, name: str, tensors: dict[str, tuple[int, ...]], **config: Any) -> AdapterFile:
    folder = tmp_path / name
    write_tensors(folder / "adapter_model.safetensors", tensors)
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(told))
    settings, source = open_adapter_files(folder)
    return AdapterFile(source, settings, folder / "adapter_config.json")


def peft_pair(module: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": (2, columns), f"{name}.lora_B.weight": (rows, 2)}


def test_peft_folder_of_a_lora_takes_rank_and_alpha_from_its_configuration(tmp_path: Path) -> None:
    file = folder_of(tmp_path, "style", peft_pair(TO_Q, 8, 8), use_rslora=True)
    pipeline, shapes = base_of("sd")
    adapter = understand(file, {}, pipeline, shapes, None)
    assert (adapter.format, adapter.path) == ("peft", tmp_path / "style")
    assert adapter.modules[0].component == "unet"
    assert adapter.modules[0].alpha == pytest.approx(4 * math.sqrt(2))
    with pytest.raises(AdapterError, match="rank 3"):
        understand(replace(file, config=file.config | {"r": 3}), {}, pipeline, shapes, None)


def test_peft_folder_of_another_kind_is_left_to_that_kind(tmp_path: Path) -> None:
    """Its modules are PEFT's own; only the component is told."""
    vectors = {f"base_model.model.{TO_Q}.ia3_l": (8, 1), f"base_model.model.{ATTENTION}.ff.net.2.ia3_l": (1, 32)}
    file = folder_of(tmp_path, "style", vectors, peft_type="IA3")
    pipeline, shapes = base_of("sd")
    adapter = understand(file, {}, pipeline, shapes, None)
    assert (adapter.modules, adapter.format) == ((), "peft")
    assert component_of(file, shapes) == "unet"


def test_component_of_a_text_encoders_folder_is_told_by_sizes_or_by_its_name(tmp_path: Path) -> None:
    _, shapes = base_of("sdxl")
    second = folder_of(tmp_path, "style", peft_pair(Q_PROJ, 10, 10))
    assert component_of(second, shapes) == "text_encoder_2"
    equal = {**shapes, "text_encoder_2": shapes["text_encoder"]}
    assert component_of(folder_of(tmp_path, "text_encoder", peft_pair(Q_PROJ, 6, 6)), equal) == "text_encoder"
    with pytest.raises(AdapterError, match="fits several components: text_encoder, text_encoder_2"):
        component_of(folder_of(tmp_path, "other", peft_pair(Q_PROJ, 6, 6)), equal)
    with pytest.raises(AdapterError, match="none of the modules"):
        component_of(folder_of(tmp_path, "odd", peft_pair("blocks.7", 6, 6)), shapes)


def test_understand_of_a_large_file_is_quick(path: Path) -> None:
    """2,000 modules: inspect has 1.5 s for all that it does."""
    unet = {f"down_blocks.{i // 100}.attentions.{i % 100}.to_q.weight": (8, 8) for i in range(2000)}
    names = [n.removesuffix(".weight").replace(".", "_") for n in unet]
    tensors = {k: v for n in names for k, v in pair(f"lora_unet_{n}").items()}
    write_tensors(path, tensors)
    pipeline, shapes = base_of("sd")
    source, _ = open_single_file(path)
    started = time.process_time()
    adapter = understand(AdapterFile(source, {}, path), {}, pipeline, {**shapes, "unet": unet}, None)
    assert len(adapter.modules) == 2000
    assert time.process_time() - started < 1
