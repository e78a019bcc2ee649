"""Decoders: ids, mask and cache in; logits and the longer cache out."""

from typing import Any

import torch

from lora_export.onnx_export.engines.parts.cache import cache_inputs, cache_outputs, cache_shape, contents, filled
from lora_export.onnx_export.engines.parts.graph_part import BATCH, LENGTH, PAST, Axes, GraphPart, Input, takes

# Decoders that get positions in Optimum, because they do not derive them from the mask.
_POSITIONS = frozenset({"gpt2", "gpt_neox", "gptj", "gpt_neo", "gpt_bigcode", "codegen"})


def part(model: Any) -> GraphPart:
    """Ids, mask and cache in; logits and the longer cache out. An empty cache makes it a prefill."""
    config = model.config.get_text_config(decoder=True)
    layers, heads, size = cache_shape(config)
    grown = "past_sequence_length + sequence_length"
    inputs: dict[str, Input] = {
        "input_ids": ((BATCH, LENGTH), torch.int64, {0: "batch_size", 1: "sequence_length"}),
        "attention_mask": ((BATCH, PAST + LENGTH), torch.int64, {0: "batch_size", 1: grown}),
    }
    if config.model_type in _POSITIONS and takes(model, "position_ids"):
        inputs["position_ids"] = inputs["input_ids"]
    plain = len(inputs)
    inputs |= cache_inputs("", range(layers), heads, size, PAST, "past_sequence_length")
    names = list(inputs)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names[:plain], values[:plain], strict=True))
        result = model(**given, past_key_values=filled(values[plain:]), use_cache=True)
        return (result.logits, *contents(result.past_key_values))

    outputs: dict[str, Axes] = {"logits": {0: "batch_size", 1: "sequence_length"}}
    outputs |= cache_outputs("", range(layers), grown)
    return GraphPart("model.onnx", "model.onnx_data", run, inputs, outputs, caches=True)
