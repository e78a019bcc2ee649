"""Tiny random pipelines of diffusers with real tokenizers: SD 1.5, SDXL, SD3, FLUX; the same bytes every time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SIZE = 32  # pixels of the pictures that these pipelines make by default
PROMPT = "a photo of the cat"


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The pipeline `kind` (sd15, sdxl, sd3, flux) as diffusers saves it."""
    pipe = build(kind).to(dtype)
    pipe.save_pretrained(folder, safe_serialization=True)
    vocab, merges = _clip_vocabulary()
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir() and (kind != "flux" or name == "tokenizer"):
            (folder / name / "vocab.json").write_text(json.dumps(vocab))
            lines = "".join(f"{a} {b}\n" for a, b in merges)
            (folder / name / "merges.txt").write_text(f"#version: 0.2\n{lines}")
    return folder


def build(kind: str) -> Any:
    """The pipeline in memory, with random weights, norms and biases."""
    pipe = _KINDS[kind]()
    for i, (_, part) in enumerate(sorted(pipe.components.items())):
        if isinstance(part, torch.nn.Module):
            randomize(part, 100 + i)
    return pipe


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Norms and biases too, so that nothing is one or zero for no reason."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = values / parameter[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.1 * values
        else:
            parameter.data = 0.05 * values
    return module.eval().requires_grad_(False)


def sample(pipe: Any, kind: str, steps: int = 3, size: int = SIZE, seed: int = 0, output: str = "np") -> Any:
    """Pictures (1, size, size, 3) in [0, 1], or latents with output="latent"."""
    more: dict[str, Any] = {"guidance_scale": 5.0}
    if kind == "flux":
        more = {"guidance_scale": 3.5, "max_sequence_length": 48}
    if kind == "sd3":
        more["max_sequence_length"] = 48
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = pipe(
        PROMPT, num_inference_steps=steps, generator=generator, height=size, width=size, output_type=output, **more
    )
    return made.images


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    known = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in known]
    letters = [chr(b) for b in known] + [chr(256 + i) for i in range(len(others))]
    merges = [("t", "h"), ("a", "n"), ("i", "n"), ("th", "e</w>"), ("an", "d</w>"), ("o", "f</w>")]
    words = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges)]
    return {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocab, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _t5_pieces() -> list[tuple[str, float]]:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-'"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    return [*pieces, ("▁the", -2.5), ("▁a", -2.5), ("▁of", -2.5)]


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast(vocab=_t5_pieces(), extra_ids=0, model_max_length=512)


def _clip(cls: str, act: str = "quick_gelu") -> Any:
    import transformers

    vocab = _clip_vocabulary()[0]
    config = transformers.CLIPTextConfig(
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(vocab),
        hidden_act=act,
        projection_dim=32,
    )
    return getattr(transformers, cls)(config)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    size = len(_t5_pieces())
    config = T5Config(
        vocab_size=size + (-size % 8),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def _vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
        sample_size=SIZE,
        **{"latent_channels": 4, **more},
    )


def _sd15() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return StableDiffusionPipeline(
        unet=unet,
        vae=_vae(),
        text_encoder=_clip("CLIPTextModel"),
        tokenizer=_clip_tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(),
        text_encoder=_clip("CLIPTextModel"),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip("CLIPTextModelWithProjection", "gelu"),
        tokenizer_2=_clip_tokenizer(),
        scheduler=scheduler,
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,  # the width of T5; what both CLIPs give is padded to it
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    vae = _vae(
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_clip("CLIPTextModelWithProjection"),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip("CLIPTextModelWithProjection", "gelu"),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(64),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 6, 6],
        guidance_embeds=True,
    )
    vae = _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    return FluxPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=_clip("CLIPTextModel"),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(32),
        tokenizer_2=_t5_tokenizer(),
        scheduler=scheduler,
    )


_KINDS: Mapping[str, Callable[[], Any]] = {"sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}
