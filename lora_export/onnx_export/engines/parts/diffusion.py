"""What is traced of a pipeline's models: Optimum's names of inputs and outputs, in its order.

A denoiser is traced at an odd size where it takes one: UNets then upsample to the size of what they add, which is
right at every size, and not by two.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lora_export.errors import ExportError
from lora_export.onnx_export.engines.parts.graph_part import BATCH, LENGTH, Axes, GraphPart, Input, Traced

FILE, DATA = "model.onnx", "model.onnx_data"
TASK = "text-to-image"
# Inputs that fp16 cannot hold: fractions of up to 1,000 steps, guidance times 1,000, places of patches.
WIDE = frozenset({"timestep", "guidance", "txt_ids", "img_ids", "time_ids"})
_FLOAT = torch.float32
_SIZES, _POOLED = 6, 1280  # numbers that SDXL is told of a picture's size; width of its pooled text
_TOKENS = 77
Run = Callable[..., tuple[torch.Tensor, ...]]


def parts_of(model: Any, part: str) -> Traced:
    """The graph of a model. part: the name of its folder in the export: unet, vae_decoder, text_encoder_2, …

    ExportError for a configuration whose inputs have no name in Optimum's graphs.
    """
    made = _PARTS.get(part) or _text_encoder
    return Traced("component", TASK, (made(model),))


def _part(run: Run, inputs: Mapping[str, Input], outputs: Mapping[str, Axes], **more: Any) -> GraphPart:
    return GraphPart(FILE, DATA, run, inputs, outputs, **more)


def _floats(*shape: int, **axes: int) -> Input:
    """A floating-point input. axes: name of a dynamic axis → its place."""
    return shape, _FLOAT, {place: name for name, place in axes.items()}


# --- denoisers ---------------------------------------------------------------------------------------------


def _unet(model: Any) -> GraphPart:
    config = model.config
    _refuse_odd_unet(config)
    unit = 2 ** (len(config.block_out_channels) - 1)
    height, width = 2 * unit + 1, 3 * unit + 1
    context = config.encoder_hid_dim or config.cross_attention_dim
    inputs = {
        "sample": _floats(BATCH, config.in_channels, height, width, batch_size=0, height=2, width=3),
        "timestep": _floats(),
        "encoder_hidden_states": _floats(BATCH, _TOKENS, context, batch_size=0, sequence_length=1),
    }
    if config.addition_embed_type == "text_time":
        pooled, sizes = _added_widths(config)
        inputs["text_embeds"] = _floats(BATCH, pooled, batch_size=0)
        inputs["time_ids"] = _floats(BATCH, sizes, batch_size=0)
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = _floats(BATCH, config.time_cond_proj_dim, batch_size=0)
    names = list(inputs)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
        return (model(**given, added_cond_kwargs=added or None, return_dict=False)[0],)

    outputs: Mapping[str, Axes] = {"out_sample": {0: "batch_size", 2: "height", 3: "width"}}
    return _part(run, inputs, outputs)


def _refuse_odd_unet(config: Any) -> None:
    odd = {
        "addition_embed_type": config.addition_embed_type not in (None, "text_time"),
        "class_embed_type": config.class_embed_type is not None,
        "num_class_embeds": config.num_class_embeds is not None,
        "encoder_hid_dim_type": config.encoder_hid_dim_type not in (None, "text_proj"),
        "cross_attention_dim": not isinstance(config.cross_attention_dim, int),
    }
    for key in (key for key, refused in odd.items() if refused):
        raise ExportError(
            f"the UNet's {key} is {config[key]!r}, for which Optimum's graphs have no input",
            where="config.json",
            expected="a UNet that reads a text and, as SDXL's does, sizes of pictures",
            next_step="use the merged pipeline with diffusers as it is",
        )


def _added_widths(config: Any) -> tuple[int, int]:
    """(of the pooled text, how many sizes): SDXL's refiner is told five numbers, all others six."""
    whole, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    sizes = _SIZES - 1 if whole - (_SIZES - 1) * each == _POOLED else _SIZES
    return whole - sizes * each, sizes


def _transformer(model: Any) -> GraphPart:
    return _flux(model) if type(model).__name__.startswith("Flux") else _sd3(model)


def _sd3(model: Any) -> GraphPart:
    config, patch = model.config, model.config.patch_size
    vars(model.pos_embed)["cropped_pos_embed"] = functools.partial(_cropped, model.pos_embed)
    size = 6 * patch, 9 * patch
    inputs = {
        "hidden_states": _floats(BATCH, config.in_channels, *size, batch_size=0, height=2, width=3),
        "encoder_hidden_states": _floats(
            BATCH, _TOKENS + LENGTH, config.joint_attention_dim, batch_size=0, sequence_length=1
        ),
        "pooled_projections": _floats(BATCH, config.pooled_projection_dim, batch_size=0),
        "timestep": _floats(BATCH, step=0),
    }
    outputs: Mapping[str, Axes] = {"out_hidden_states": {0: "batch_size", 2: "height", 3: "width"}}
    return _part(_by_name(model, inputs), inputs, outputs)


def _cropped(places: Any, height: Any, width: Any) -> torch.Tensor:
    """The middle of a table of places, for latents of this size: (1, patches, width of the model).

    diffusers begins at (size − patches) // 2. A trace makes 8 + (−patches // 2) of it, and ONNX divides towards
    zero, which is wrong for odd numbers. The same place is counted here from the middle on.
    """
    size = places.pos_embed_max_size
    rows, columns = height // places.patch_size, width // places.patch_size
    top, left = (size // 2 - (n + 1 - size % 2) // 2 for n in (rows, columns))
    every: torch.Tensor = places.pos_embed.reshape(1, size, size, -1)
    table = every[:, top : top + rows, left : left + columns, :]
    return table.reshape(1, -1, table.shape[-1])


def _flux(model: Any) -> GraphPart:
    config, patches, tokens = model.config, 35, 3 * LENGTH
    inputs = {
        "hidden_states": _floats(BATCH, patches, config.in_channels, batch_size=0, packed_height_width=1),
        "encoder_hidden_states": _floats(
            BATCH, tokens, config.joint_attention_dim, batch_size=0, sequence_length=1
        ),
        "pooled_projections": _floats(BATCH, config.pooled_projection_dim, batch_size=0),
        "timestep": _floats(BATCH, step=0),
        "txt_ids": _floats(tokens, 3, sequence_length=0),
        "img_ids": _floats(patches, 3, packed_height_width=0),
    }
    if config.guidance_embeds:
        inputs["guidance"] = _floats(BATCH, batch_size=0)
    outputs: Mapping[str, Axes] = {"out_hidden_states": {0: "batch_size", 1: "packed_height_width"}}
    return _part(_by_name(model, inputs), inputs, outputs)


def _by_name(model: Any, inputs: Mapping[str, Input]) -> Run:
    names = list(inputs)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (model(**dict(zip(names, values, strict=True)), return_dict=False)[0],)

    return run


# --- autoencoders ------------------------------------------------------------------------------------------


def _vae_encoder(model: Any) -> GraphPart:
    config = model.config
    factor = 2 ** (len(config.down_block_types) - 1)
    axes = {"batch_size": 0, "sample_height": 2, "sample_width": 3}
    inputs = {"sample": _floats(BATCH, config.in_channels, 10 * factor, 14 * factor, **axes)}

    def run(sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded = model.encoder(sample)
        return (encoded if model.quant_conv is None else model.quant_conv(encoded),)

    sizes = {2: f"sample_height / {factor}", 3: f"sample_width / {factor}"}
    return _part(run, inputs, {"latent_parameters": {0: "batch_size", **sizes}})


def _vae_decoder(model: Any) -> GraphPart:
    config = model.config
    factor = 2 ** (len(config.up_block_types) - 1)
    axes = {"batch_size": 0, "latent_height": 2, "latent_width": 3}
    inputs = {"latent_sample": _floats(BATCH, config.latent_channels, 10, 14, **axes)}

    def run(latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (model.decode(latent, return_dict=False)[0],)

    sizes = {2: f"latent_height * {factor}", 3: f"latent_width * {factor}"}
    return _part(run, inputs, {"sample": {0: "batch_size", **sizes}})


# --- text encoders -----------------------------------------------------------------------------------------


def _text_encoder(model: Any) -> GraphPart:
    """CLIP's with the states of every layer, which pipelines choose from; T5's with the last."""
    name, axes = type(model).__name__, {0: "batch_size", 1: "sequence_length"}
    inputs: Mapping[str, Input] = {"input_ids": ((BATCH, LENGTH), torch.int64, axes)}
    if not name.startswith("CLIP"):

        def last(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (model(input_ids=ids).last_hidden_state,)

        return _part(last, inputs, {"last_hidden_state": axes})
    own = {"text_embeds": {0: "batch_size"}, "last_hidden_state": axes}
    if not name.endswith("WithProjection"):
        own = {"last_hidden_state": axes, "pooler_output": {0: "batch_size"}}

    def all_states(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = model(input_ids=ids, output_hidden_states=True)
        return (*(result[name] for name in own), *result.hidden_states)

    layers = model.config.num_hidden_layers
    outputs: Mapping[str, Axes] = own | {f"hidden_states.{i}": axes for i in range(layers + 1)}
    return _part(all_states, inputs, outputs, longest=int(model.config.max_position_embeddings))


_PARTS: Mapping[str, Callable[[Any], GraphPart]] = {
    "unet": _unet,
    "transformer": _transformer,
    "vae_encoder": _vae_encoder,
    "vae_decoder": _vae_decoder,
}
