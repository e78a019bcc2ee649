"""Vision-language models: pictures to features, ids to embeddings, and a decoder that is given embeddings.

The rows of `inputs_embeds` and `image_features` are what the decoder reads for one token. Beside the embedding they
carry what the model wants to know of pictures further inside: a runtime only has to put the rows of a picture where
the ids have its placeholders.
"""

from typing import Any

import torch

from lora_export.onnx_export.engines.parts import pictures
from lora_export.onnx_export.engines.parts.graph_part import BATCH, LENGTH, PAST, Axes, GraphPart, Input
from lora_export.onnx_export.engines.parts.kept import Kept, held_by, holding, kept_by
from lora_export.onnx_export.engines.parts.rows import Rows

VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
_TOKENS: Axes = {0: "batch_size", 1: "sequence_length"}


def sees(model: Any) -> bool:
    """Whether the model continues texts that have pictures among their tokens."""
    return model.can_generate() and not model.config.is_encoder_decoder and hasattr(model, "get_image_features")


def parts(model: Any) -> tuple[GraphPart, ...]:
    """The graphs in the order in which they run. A tied head and the embedding share a tensor of a data file."""
    rows = Rows.of(model)
    return _vision(model, rows), _embedding(model, rows), _decoder(model, rows)


def _vision(model: Any, rows: Rows) -> GraphPart:
    seen = pictures.inputs(model)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (rows.of_pictures(pictures.features(model, dict(zip(seen, values, strict=True)))),)

    return GraphPart(f"{VISION}.onnx", f"{VISION}.onnx_data", run, seen, {"image_features": {0: "image_tokens"}})


def _embedding(model: Any, rows: Rows) -> GraphPart:
    embedding = model.get_input_embeddings()
    placeholder = pictures.placeholder(model.config)

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        known = ids if placeholder < embedding.num_embeddings else torch.where(ids == placeholder, 0, ids)
        return (rows.of_texts(embedding(known)),)

    inputs: dict[str, Input] = {"input_ids": ((BATCH, LENGTH), torch.int64, _TOKENS)}
    return GraphPart(f"{EMBEDDING}.onnx", f"{DECODER}.onnx_data", run, inputs, {"inputs_embeds": _TOKENS})


def _decoder(model: Any, rows: Rows) -> GraphPart:
    """Rows, mask, positions and cache in; logits and the longer cache out. An empty cache makes it a prefill."""
    grown = "past_sequence_length + sequence_length"
    positions: Input = ((BATCH, LENGTH), torch.int64, _TOKENS)
    if rows.axes > 1:
        positions = ((rows.axes, BATCH, LENGTH), torch.int64, {1: "batch_size", 2: "sequence_length"})
    inputs: dict[str, Input] = {
        "inputs_embeds": ((BATCH, LENGTH, rows.width), torch.float32, _TOKENS),
        "attention_mask": ((BATCH, PAST + LENGTH), torch.int64, {0: "batch_size", 1: grown}),
        "position_ids": positions,
    }
    plain = len(inputs)
    kept = _kept(model)
    inputs |= {each.past: each.past_input(PAST, "past_sequence_length") for each in kept}

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embeds, mask, positions = values[:plain]
        cache = holding(kept, values[plain:], model.config)
        with rows.inside(model, embeds, mask, cache) as given:
            result = model(**given, position_ids=positions, past_key_values=cache, use_cache=True)
        return (result.logits, *held_by(result.past_key_values, kept))

    outputs: dict[str, Axes] = {"logits": _TOKENS}
    outputs |= {each.present: each.axes(grown) for each in kept}
    return GraphPart(f"{DECODER}.onnx", f"{DECODER}.onnx_data", run, inputs, outputs, caches=True)


def _kept(model: Any) -> tuple[Kept, ...]:
    def run(ids: torch.Tensor, cache: Any) -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)

    from lora_export.onnx_export.engines.dynamo_passes.tracing import without_values

    with without_values(model):
        return kept_by(model, run)
