"""Encoder-decoders: the encoder, the first step of the decoder, and its later steps."""

from typing import Any

import torch

from lora_export.onnx_export.engines.parts.cache import cache_inputs, cache_outputs, cache_shape, contents, filled
from lora_export.onnx_export.engines.parts.graph_part import BATCH, ENCODED, LENGTH, PAST, Axes, GraphPart, Input


def parts(model: Any) -> tuple[GraphPart, ...]:
    return _encoder(model), *_decoders(model)


def _encoder(model: Any) -> GraphPart:
    encoder = model.get_encoder()
    axes = {0: "batch_size", 1: "encoder_sequence_length"}
    ids = ((BATCH, ENCODED), torch.int64, axes)

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,)

    inputs = {"input_ids": ids, "attention_mask": ids}
    return GraphPart("encoder_model.onnx", "encoder_model.onnx_data", run, inputs, {"last_hidden_state": axes})


def _decoders(model: Any) -> tuple[GraphPart, GraphPart]:
    """The first step, which computes the keys and values of the encoder's states, and all later steps.

    These are two graphs with the same weights, in one data file.
    """
    from transformers import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    layers, heads, size = cache_shape(model.config)
    encoded = {0: "batch_size", 1: "encoder_sequence_length"}
    ids: Input = ((BATCH, LENGTH), torch.int64, {0: "batch_size", 1: "decoder_sequence_length"})
    mask: Input = ((BATCH, ENCODED), torch.int64, encoded)
    states: Input = ((BATCH, ENCODED, model.config.d_model), torch.float32, encoded)
    logits = {"logits": {0: "batch_size", 1: "decoder_sequence_length"}}

    def step(ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor | None, cache: Any) -> Any:
        given = BaseModelOutput(last_hidden_state=states)
        return model(
            encoder_outputs=given, attention_mask=mask, decoder_input_ids=ids, past_key_values=cache, use_cache=True
        )

    def first(ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = step(ids, mask, states, EncoderDecoderCache(filled(()), filled(())))
        cache = result.past_key_values
        own, cross = contents(cache.self_attention_cache), contents(cache.cross_attention_cache)
        return (
            result.logits,
            *(x for i in range(layers) for x in (*own[2 * i : 2 * i + 2], *cross[2 * i : 2 * i + 2])),
        )

    def later(ids: torch.Tensor, mask: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = filled([x for i in range(layers) for x in past[4 * i : 4 * i + 2]])
        cross = filled([x for i in range(layers) for x in past[4 * i + 2 : 4 * i + 4]])
        cache = EncoderDecoderCache(own, cross)
        # The cache has what was encoded; the model only asks for its shape.
        shape = torch.zeros((past[2].shape[0], past[2].shape[2], model.config.d_model))
        result = step(ids, mask, shape, cache)
        return (result.logits, *contents(result.past_key_values.self_attention_cache))

    own, cross = "past_decoder_sequence_length", "encoder_sequence_length"
    grown = f"{own} + decoder_sequence_length"
    with_past = {"input_ids": ids, "encoder_attention_mask": mask}
    first_outputs: dict[str, Axes] = dict(logits)
    for i in range(layers):
        with_past |= cache_inputs("decoder.", [i], heads, size, PAST, own)
        with_past |= cache_inputs("encoder.", [i], heads, size, ENCODED, cross)
        first_outputs |= cache_outputs("decoder.", [i], "decoder_sequence_length")
        first_outputs |= cache_outputs("encoder.", [i], cross)
    inputs = {"input_ids": ids, "encoder_attention_mask": mask, "encoder_hidden_states": states}
    data = "decoder_model.onnx_data"
    later_outputs = logits | cache_outputs("decoder.", range(layers), grown)
    return (
        GraphPart("decoder_model.onnx", data, first, inputs, first_outputs, caches=True),
        GraphPart("decoder_with_past_model.onnx", data, later, with_past, later_outputs, caches=True),
    )
