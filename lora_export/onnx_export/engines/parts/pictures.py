"""What a vision-language model reads of pictures, and the features that it makes of them.

A graph takes any number of pictures, and any size of them where the model does. Where transformers computes with
the numbers of an input (the grid of each picture), the same is computed here with tensors of a known shape.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from lora_export.onnx_export.engines.parts import patches
from lora_export.onnx_export.engines.parts.graph_part import Axes, Input, NotTraceable

PICTURES = 3  # to trace with
_KNOWN = {"pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask"}
Seen = Mapping[str, torch.Tensor]
_GRID = "image_grid_thw"
_GRID_NAMES = {"qwen2_vl": "grid_thw"}  # as transformers.js names the input


def placeholder(config: Any) -> int:
    """The id that stands in a text for each token of a picture."""
    return int(
        next(v for n in ("image_token_id", "image_token_index") if (v := getattr(config, n, None)) is not None)
    )


def inputs(model: Any) -> dict[str, Input]:
    """By the names of transformers' processors. NotTraceable for a model that wants to know more of a picture."""
    taken = _taken(model)
    _refuse_unknown(model)
    vision = model.config.vision_config
    if _GRID in taken:
        return _packed(model)
    height, width = _size(vision)
    channels = getattr(vision, "num_channels", 3)
    if "pixel_attention_mask" in taken:
        axes: Axes = {0: "batch_size", 1: "num_images"}
        return {
            "pixel_values": ((2, PICTURES, channels, height, width), torch.float32, axes),
            "pixel_attention_mask": ((2, PICTURES, height, width), torch.bool, axes),
        }
    if "image_sizes" in taken:
        cell = _cell(model)
        return {"pixel_values": ((1, channels, 2 * cell, 3 * cell), torch.float32, {2: "height", 3: "width"})}
    axes = {0: "num_images"}
    return {"pixel_values": ((PICTURES, channels, height, width), torch.float32, axes)}


def features(model: Any, given: Seen) -> torch.Tensor:
    """(tokens, size) of all pictures, one after another."""
    if _GRID in _taken(model):
        return _of_patches(model, given)
    if "pixel_attention_mask" in given:
        return _of_tiles(model, given["pixel_values"], given["pixel_attention_mask"])
    if "image_sizes" in _taken(model):
        return _of_one(model, given["pixel_values"])
    with _undivided():
        made = model.get_image_features(**given, return_dict=True).pooler_output
    parts = made if isinstance(made, list | tuple) else [made]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _refuse_unknown(model: Any) -> None:
    name, config = type(model).__name__, model.config
    if getattr(config, "vision_config", None) is None:
        raise NotTraceable(
            f"{name} reads pictures, but its configuration has no vision_config that tells their size"
        )
    if getattr(config, "image_grid_pinpoints", None):
        raise NotTraceable(
            f"{name} cuts each picture by its original size, with numbers of an input that a trace does not have"
        )
    parameters = inspect.signature(model.get_image_features).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if more := sorted(needed - _KNOWN):
        raise NotTraceable(f"{name} makes features of pictures from {', '.join(more)}, which no runtime gives it")


def _taken(model: Any) -> set[str]:
    return set(inspect.signature(model.get_image_features).parameters)


def _size(vision: Any) -> tuple[int, int]:
    size = vision.image_size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _cell(model: Any) -> int:
    """Pixels along a side of what becomes one token."""
    return int(model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1))


@contextlib.contextmanager
def _undivided() -> Iterator[None]:
    """Let a list of a tensor's rows have the tensor as its only element.

    Models return the features of each picture by itself; a graph would have as many pictures as it was traced with.
    """

    def unsized(tensor: torch.Tensor) -> int:
        raise TypeError("the number of pictures is not known")  # a list asks for it, and does without

    with mock.patch.multiple(torch.Tensor, __iter__=lambda tensor: iter((tensor,)), __len__=unsized):
        yield


# --- patches of all pictures in one row, and the grid of each ----------------------------------------------------


def _packed(model: Any) -> dict[str, Input]:
    vision = model.config.vision_config
    channels = getattr(vision, "in_channels", None) or vision.in_chans
    values = channels * vision.temporal_patch_size * vision.patch_size**2
    count = 2 * PICTURES * vision.spatial_merge_size**2
    name = _GRID_NAMES.get(model.config.model_type, _GRID)
    return {
        "pixel_values": ((count, values), torch.float32, {0: "num_patches"}),
        name: ((PICTURES, 3), torch.int64, {0: "num_images"}),
    }


def _of_patches(model: Any, given: Seen) -> torch.Tensor:
    """As get_image_features, which splits the result by the numbers of the grids. Features of inner layers follow
    those of the last one, side by side."""
    pixels, grids = given.values()
    tower = model.model.visual
    with patches.together(tower):
        made = tower(pixels, grid_thw=grids, return_dict=True, **patches.known(tower, pixels, grids))
    return torch.cat([made.pooler_output, *(getattr(made, "deepstack_features", None) or ())], -1)


# --- one picture of any size -------------------------------------------------------------------------------------


def _of_one(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """As get_image_features for one picture, whose size is that of the tensor. Several of different sizes would be
    cut out of a padded tensor one by one."""
    base, layer = model.model, model.config.vision_feature_layer
    sizes = [(pixels.shape[2], pixels.shape[3])]
    states = base.vision_tower(pixels, image_sizes=sizes, output_hidden_states=True, return_dict=True).hidden_states
    chosen = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], -1)
    made: torch.Tensor = base.multi_modal_projector(chosen.squeeze(0), sizes)
    return made


# --- pictures cut into tiles of one size, some of them padding ----------------------------------------------------


def _of_tiles(model: Any, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As get_image_features, but padding (tiles of zeros) is left out at the end, where its number does no harm."""
    tiles, shown = pixels.flatten(0, 1), mask.flatten(0, 1)
    side = model.config.vision_config.patch_size
    count, height, width = shown.shape
    cells = shown.reshape(count, height // side, side, width // side, side).any(4).any(2)
    states = model.model.vision_model(pixel_values=tiles, patch_attention_mask=cells).last_hidden_state
    made: torch.Tensor = model.model.connector(states)
    real = (tiles != 0).flatten(1).any(1)
    return made[real].flatten(0, 1)
