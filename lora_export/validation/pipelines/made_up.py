"""Inputs for a denoiser that stands alone, without the text encoders that would make its embeddings."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lora_export.contracts import Component
from lora_export.errors import InputError
from lora_export.validation.pipelines.sampling import TIMES, Call

BATCH = 2
TOKENS = 7  # of a prompt
LATENTS = 16  # at most: height and width
RANGE = 1000  # timesteps of training


def made_up_calls(component: Component, model: Any, seed: int) -> list[Call]:
    """Seeded latents and embeddings at timesteps over the whole range. None for a class whose inputs are
    not known: they come from the other models of its pipeline."""
    makers: dict[str, Callable[[Any, float, torch.Generator], Mapping[str, Any]]] = {
        "UNet2DConditionModel": _unet, "SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux,
        "AutoencoderKL": _autoencoder,
    }  # fmt: skip
    maker = makers.get(component.class_name)
    if maker is None:
        return []
    if maker is _autoencoder:
        return [Call("", maker(model, 0.0, torch.Generator().manual_seed(seed)))]
    calls = []
    for number, share in enumerate(TIMES):
        generator = torch.Generator().manual_seed(seed + number)
        calls.append(Call(f"t{round(share * RANGE)}", maker(model, share, generator)))
    return calls


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _size(config: Any) -> int:
    size = config.sample_size
    return min(LATENTS, int(size if isinstance(size, int) else LATENTS))


def _unet(model: Any, share: float, generator: torch.Generator) -> Mapping[str, Any]:
    config, size = model.config, _size(model.config)
    width = config.cross_attention_dim
    width = width[0] if isinstance(width, list | tuple) else width
    given: dict[str, Any] = {
        "sample": _normal(generator, BATCH, config.in_channels, size, size),
        "timestep": torch.tensor(float(round(share * RANGE))),
        "encoder_hidden_states": _normal(generator, BATCH, TOKENS, config.encoder_hid_dim or width),
    }
    if config.addition_embed_type == "text_time":
        times = config.addition_time_embed_dim
        pooled = config.projection_class_embeddings_input_dim - 6 * times
        ids = torch.tensor([[8.0 * size, 8.0 * size, 0.0, 0.0, 8.0 * size, 8.0 * size]] * BATCH)
        given["added_cond_kwargs"] = {"text_embeds": _normal(generator, BATCH, pooled), "time_ids": ids}
    elif config.addition_embed_type is not None:
        raise InputError(
            f"a UNet alone with additional embeddings of type {config.addition_embed_type}",
            expected="text_time, or none",
            next_step="give -b and -m the folders with model_index.json",
        )
    if config.time_cond_proj_dim:
        given["timestep_cond"] = _normal(generator, BATCH, config.time_cond_proj_dim)
    return given


def _sd3(model: Any, share: float, generator: torch.Generator) -> Mapping[str, Any]:
    config, size = model.config, _size(model.config)
    return {
        "hidden_states": _normal(generator, BATCH, config.in_channels, size, size),
        "encoder_hidden_states": _normal(generator, BATCH, TOKENS, config.joint_attention_dim),
        "pooled_projections": _normal(generator, BATCH, config.pooled_projection_dim),
        "timestep": torch.full((BATCH,), float(round(share * RANGE))),
    }


def _flux(model: Any, share: float, generator: torch.Generator) -> Mapping[str, Any]:
    config, side = model.config, LATENTS // 4
    axes = len(config.axes_dims_rope)
    places = torch.zeros(side, side, axes)
    places[..., -2] = torch.arange(side)[:, None]
    places[..., -1] = torch.arange(side)
    given = {
        "hidden_states": _normal(generator, BATCH, side * side, config.in_channels),
        "encoder_hidden_states": _normal(generator, BATCH, TOKENS, config.joint_attention_dim),
        "pooled_projections": _normal(generator, BATCH, config.pooled_projection_dim),
        "timestep": torch.full((BATCH,), share),
        "img_ids": places.reshape(-1, axes),
        "txt_ids": torch.zeros(TOKENS, axes),
    }
    if "guidance" in inspect.signature(type(model).forward).parameters and config.guidance_embeds:
        given["guidance"] = torch.full((BATCH,), 3.5)
    return given


def _autoencoder(model: Any, _: float, generator: torch.Generator) -> Mapping[str, Any]:
    size = 4 * LATENTS
    return {"sample": _normal(generator, BATCH, model.config.in_channels, size, size)}
