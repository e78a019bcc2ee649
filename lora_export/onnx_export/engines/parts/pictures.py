"""What a vision-language model reads of pictures, and the features that it makes of them.

A graph takes any number of pictures, and any size of them where the model does. Where transformers computes with the
numbers of an input (the grid of each picture), the same is computed here with tensors of a shape that is known.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from lora_export.onnx_export.engines.parts import patches
from lora_export.onnx_export.engines.parts.graph_part import Axes, Input

PICTURES = 3  # to trace with
Seen = Mapping[str, torch.Tensor]
_GRID = "image_grid_thw"
_GRID_NAMES = {"qwen2_vl": "grid_thw"}  # as transformers.js names the input


def placeholder(config: Any) -> int:
    """The id that stands in a text for each token of a picture."""
    return int(
        next(v for n in ("image_token_id", "image_token_index") if (v := getattr(config, n, None)) is not None)
    )


def inputs(model: Any) -> dict[str, Input]:
    """By the names of transformers' processors."""
    taken, vision = _taken(model), model.config.vision_config
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
    axes = {0: "num_images"}
    if "image_sizes" in taken:
        axes |= {2: "height", 3: "width"}
        height, width = height - height % _cell(model), height
    return {"pixel_values": ((PICTURES, channels, height, width), torch.float32, axes)}


def features(model: Any, given: Seen) -> torch.Tensor:
    """(tokens, size) of all pictures, one after another."""
    if _GRID in _taken(model):
        return _of_patches(model, given)
    if "pixel_attention_mask" in given:
        return _of_tiles(model, given["pixel_values"], given["pixel_attention_mask"])
    with _undivided():
        made = model.get_image_features(**given, return_dict=True).pooler_output
    parts = made if isinstance(made, list | tuple) else [made]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


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
