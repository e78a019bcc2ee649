"""The cache of a decoder as inputs and outputs of a graph."""

from collections.abc import Iterable
from typing import Any

import torch

from lora_export.onnx_export.engines.parts.graph_part import BATCH, Axes, Input


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, heads and head size of the cache, from the configuration as Optimum normalizes it."""
    from optimum.utils import NormalizedConfigManager

    normal = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    of = "decoder_" if config.is_encoder_decoder and normal.has_attribute("decoder_num_layers") else ""
    layers = int(getattr(normal, f"{of}num_layers"))
    heads = int(getattr(normal, f"{of}num_attention_heads"))
    size = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or int(normal.hidden_size) // heads
    return layers, heads, int(size)


def cache_inputs(of: str, layers: Iterable[int], heads: int, size: int, length: int, axis: str) -> dict[str, Input]:
    each = ((BATCH, heads, length, size), torch.float32, {0: "batch_size", 2: axis})
    return {f"past_key_values.{i}.{of}{what}": each for i in layers for what in ("key", "value")}


def cache_outputs(of: str, layers: Iterable[int], axis: str) -> dict[str, Axes]:
    return {f"present.{i}.{of}{what}": {0: "batch_size", 2: axis} for i in layers for what in ("key", "value")}


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
