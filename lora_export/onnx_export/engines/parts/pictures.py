"""What a vision-language model reads of pictures, and the features that it makes of them."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from lora_export.onnx_export.engines.parts.graph_part import Input

PICTURES = 3  # to trace with


def placeholder(config: Any) -> int:
    """The id that stands in a text for each token of a picture."""
    return int(next(v for n in ("image_token_id", "image_token_index") if (v := getattr(config, n, None)) is not None))


def inputs(model: Any) -> dict[str, Input]:
    vision = model.config.vision_config
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    return {"pixel_values": ((PICTURES, channels, height, width), torch.float32, {0: "num_images"})}


def features(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, size) of all pictures, one after another."""
    with _undivided():
        made = model.get_image_features(**given, return_dict=True).pooler_output
    parts = made if isinstance(made, list | tuple) else [made]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@contextlib.contextmanager
def _undivided() -> Iterator[None]:
    """Let a list of a tensor's rows have the tensor as its only element.

    Models return the features of each picture by itself; a graph would have as many pictures as it was traced with.
    """

    def unsized(tensor: torch.Tensor) -> int:
        raise TypeError("the number of pictures is not known")  # a list asks for it, and does without

    whole = {"__iter__": lambda tensor: iter((tensor,)), "__len__": unsized}
    with mock.patch.multiple(torch.Tensor, **whole):
        yield


def takes(model: Any) -> set[str]:
    return set(inspect.signature(model.get_image_features).parameters)
