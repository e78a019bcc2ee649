"""Decoders: ids, mask, positions and cache in; logits and the longer cache out."""

from typing import Any

import torch

from lora_export.onnx_export.engines.parts.graph_part import BATCH, LENGTH, PAST, Axes, GraphPart, Input, takes
from lora_export.onnx_export.engines.parts.kept import Kept, held_by, holding, kept_by

_GROWN = "past_sequence_length + sequence_length"


def part(model: Any) -> GraphPart:
    """Ids, mask and cache in; logits and the longer cache out. An empty cache makes it a prefill.

    Positions are an input where the model takes them, as in Optimum: a row that is padded on the left has others
    than one that is not.
    """
    kept = _kept(model)
    inputs: dict[str, Input] = {
        "input_ids": ((BATCH, LENGTH), torch.int64, {0: "batch_size", 1: "sequence_length"}),
        "attention_mask": ((BATCH, PAST + LENGTH), torch.int64, {0: "batch_size", 1: _GROWN}),
    }
    if takes(model, "position_ids"):
        inputs["position_ids"] = inputs["input_ids"]
    plain = list(inputs)
    inputs |= {each.past: each.past_input(PAST, "past_sequence_length") for each in kept}

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(plain, values[: len(plain)], strict=True))
        cache = holding(kept, values[len(plain) :], model.config)
        result = model(**given, past_key_values=cache, use_cache=True)
        return (result.logits, *held_by(result.past_key_values, kept))

    outputs: dict[str, Axes] = {"logits": {0: "batch_size", 1: "sequence_length"}}
    outputs |= {each.present: each.axes(_GROWN) for each in kept}
    return GraphPart("model.onnx", "model.onnx_data", run, inputs, outputs, caches=True)


def _kept(model: Any) -> tuple[Kept, ...]:
    def run(ids: torch.Tensor, cache: Any) -> None:
        positions = {"position_ids": torch.arange(ids.shape[1])[None].expand(ids.shape)}
        given = positions if takes(model, "position_ids") else {}
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **given)

    from lora_export.onnx_export.engines.dynamo_passes.tracing import traceable, without_values

    with without_values(model), traceable(model):
        return kept_by(model, run)
