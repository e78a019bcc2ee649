"""The cache of a decoder as inputs and outputs of a graph."""

from typing import Any

import torch


def filled(values: Any) -> Any:
    """A cache with these keys and values in turn. Its own constructor would join them to empty tensors."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for key, value in zip(values[::2], values[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def contents(cache: Any) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]
