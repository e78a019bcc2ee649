"""What is traced of a model: one part per graph file, with Optimum's names of files, inputs and outputs."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.choices import ModelKind

Axes = dict[int, str]
Input = tuple[tuple[int, ...], torch.dtype, Axes]
BATCH, LENGTH = 2, 16  # sizes to trace with; 1 would be taken for a constant
PAST, ENCODED = 5, 11
# Decoders that get positions in Optimum, because they do not derive them from the mask.
_POSITIONS = frozenset({"gpt2", "gpt_neox", "gptj", "gpt_neo", "gpt_bigcode", "codegen"})


@dataclass(frozen=True)
class GraphPart:
    """run: takes the inputs and returns the outputs, in order; caches: whether it has a cache as input or output.

    inputs: by name, the shape and type to trace with, and dynamic axes; outputs: their dynamic axes.
    """

    file: str
    data: str
    run: Callable[..., tuple[torch.Tensor, ...]]
    inputs: Mapping[str, Input]
    outputs: Mapping[str, Axes]
    caches: bool = False


@dataclass(frozen=True)
class Traced:
    kind: ModelKind
    task: str
    parts: tuple[GraphPart, ...] = field(default=())


def parts_of(model: Any, task: str) -> Traced:
    """The graphs of a model, depending on what it takes and whether it generates."""
    if model.config.is_encoder_decoder and model.can_generate():
        return Traced("seq2seq", f"{task}-with-past", (_encoder(model), *_decoders(model)))
    if model.can_generate():
        return Traced("decoder", f"{task}-with-past", (_decoder(model),))
    return Traced("encoder", task, (_single(model),))


# --- one forward -------------------------------------------------------------------------------------------


def _single(model: Any) -> GraphPart:
    """A model that does not generate: inputs from the signature of forward, outputs as in Optimum."""
    inputs = _inputs(model)
    names = list(inputs)
    outputs = _outputs(model)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        result = model(**given, **({"use_cache": False} if _takes(model, "use_cache") else {}))
        return tuple(result[name] for name in outputs)

    return GraphPart("model.onnx", "model.onnx_data", run, inputs, outputs)


def _inputs(model: Any) -> dict[str, Input]:
    config = model.config
    inputs: dict[str, Input] = {}
    ids: Input = ((BATCH, LENGTH), torch.int64, {0: "batch_size", 1: "sequence_length"})
    if _takes(model, "input_ids"):
        two_towers = _takes(model, "pixel_values")
        axes = {0: "text_batch_size" if two_towers else "batch_size", 1: "sequence_length"}
        inputs["input_ids"] = (ids[0], ids[1], axes)
        if two_towers:
            inputs["pixel_values"] = _pixels(config.vision_config, "image_batch_size")
        inputs["attention_mask"] = (ids[0], ids[1], axes)
        if _takes(model, "token_type_ids") and getattr(config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = (ids[0], ids[1], axes)
    elif _takes(model, "pixel_values"):
        inputs["pixel_values"] = _pixels(config, "batch_size")
    elif _takes(model, "input_values"):
        axes = {0: "batch_size", 1: "sequence_length"}
        inputs["input_values"] = ((BATCH, 16_000), torch.float32, axes)
        if getattr(config, "feat_extract_norm", None) == "layer":  # others were trained without a mask
            inputs["attention_mask"] = ((BATCH, 16_000), torch.int64, axes)
    return inputs


def _pixels(config: Any, batch: str) -> Input:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (BATCH, getattr(config, "num_channels", 3), height, width), torch.float32, {0: batch}


def _outputs(model: Any) -> dict[str, Axes]:
    name, batch = type(model).__name__, {0: "batch_size"}
    per_token = {0: "batch_size", 1: "sequence_length"}
    if _takes(model, "pixel_values") and _takes(model, "input_ids"):
        return {
            "logits_per_image": {0: "image_batch_size", 1: "text_batch_size"},
            "logits_per_text": {0: "text_batch_size", 1: "image_batch_size"},
            "text_embeds": {0: "text_batch_size"},
            "image_embeds": {0: "image_batch_size"},
        }
    if name.endswith("ForQuestionAnswering"):
        return {"start_logits": per_token, "end_logits": per_token}
    if name.endswith("WithProjection"):
        return {"text_embeds" if _takes(model, "input_ids") else "image_embeds": batch}
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        return {"logits": batch}
    if _takes(model, "input_values"):
        per_token = {0: "batch_size", 1: "encoder_sequence_length"}
    if not name.endswith(("Model", "EncoderModel")):
        return {"logits": per_token}
    return {"last_hidden_state": batch if _takes(model, "pixel_values") else per_token}


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


# --- decoders with a cache ---------------------------------------------------------------------------------


def _decoder(model: Any) -> GraphPart:
    """Ids, mask and cache in; logits and the longer cache out. An empty cache makes it a prefill."""
    config = model.config.get_text_config(decoder=True)
    layers, heads, size = _cache_shape(config)
    grown = "past_sequence_length + sequence_length"
    inputs: dict[str, Input] = {
        "input_ids": ((BATCH, LENGTH), torch.int64, {0: "batch_size", 1: "sequence_length"}),
        "attention_mask": ((BATCH, PAST + LENGTH), torch.int64, {0: "batch_size", 1: grown}),
    }
    if config.model_type in _POSITIONS and _takes(model, "position_ids"):
        inputs["position_ids"] = inputs["input_ids"]
    plain = len(inputs)
    inputs |= _cache_inputs("", layers, heads, size, PAST, "past_sequence_length")
    names = list(inputs)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names[:plain], values[:plain], strict=True))
        result = model(**given, past_key_values=_filled(values[plain:]), use_cache=True)
        return (result.logits, *_contents(result.past_key_values))

    outputs: dict[str, Axes] = {"logits": {0: "batch_size", 1: "sequence_length"}}
    outputs |= _cache_outputs("", layers, grown)
    return GraphPart("model.onnx", "model.onnx_data", run, inputs, outputs, caches=True)


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

    layers, heads, size = _cache_shape(model.config)
    encoded = {0: "batch_size", 1: "encoder_sequence_length"}
    ids: Input = ((BATCH, LENGTH), torch.int64, {0: "batch_size", 1: "decoder_sequence_length"})
    mask: Input = ((BATCH, ENCODED), torch.int64, encoded)
    states: Input = ((BATCH, ENCODED, _width(model.config)), torch.float32, encoded)
    logits = {"logits": {0: "batch_size", 1: "decoder_sequence_length"}}

    def step(ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor | None, cache: Any) -> Any:
        given = BaseModelOutput(last_hidden_state=states)
        return model(
            encoder_outputs=given, attention_mask=mask, decoder_input_ids=ids, past_key_values=cache, use_cache=True
        )

    def first(ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = step(ids, mask, states, EncoderDecoderCache(_filled(()), _filled(())))
        cache = result.past_key_values
        own, cross = _contents(cache.self_attention_cache), _contents(cache.cross_attention_cache)
        return (
            result.logits,
            *(x for i in range(layers) for x in (*own[2 * i : 2 * i + 2], *cross[2 * i : 2 * i + 2])),
        )

    def later(ids: torch.Tensor, mask: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = _filled([x for i in range(layers) for x in past[4 * i : 4 * i + 2]])
        cross = _filled([x for i in range(layers) for x in past[4 * i + 2 : 4 * i + 4]])
        cache = EncoderDecoderCache(own, cross)
        # The cache has what was encoded; the model only asks for its shape.
        shape = torch.zeros((past[2].shape[0], past[2].shape[2], _width(model.config)))
        result = step(ids, mask, shape, cache)
        return (result.logits, *_contents(result.past_key_values.self_attention_cache))

    own, cross = "past_decoder_sequence_length", "encoder_sequence_length"
    grown = f"{own} + decoder_sequence_length"
    with_past = {"input_ids": ids, "encoder_attention_mask": mask}
    first_outputs: dict[str, Axes] = dict(logits)
    for i in range(layers):
        with_past |= _cache_inputs("decoder.", [i], heads, size, PAST, own)
        with_past |= _cache_inputs("encoder.", [i], heads, size, ENCODED, cross)
        first_outputs |= _cache_outputs("decoder.", [i], "decoder_sequence_length")
        first_outputs |= _cache_outputs("encoder.", [i], cross)
    inputs = {"input_ids": ids, "encoder_attention_mask": mask, "encoder_hidden_states": states}
    data = "decoder_model.onnx_data"
    later_outputs = logits | _cache_outputs("decoder.", layers, grown)
    return (
        GraphPart("decoder_model.onnx", data, first, inputs, first_outputs, caches=True),
        GraphPart("decoder_with_past_model.onnx", data, later, with_past, later_outputs, caches=True),
    )


def _width(config: Any) -> int:
    return int(config.d_model)


def _cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, heads and head size of the cache, from the configuration as Optimum normalizes it."""
    from optimum.utils import NormalizedConfigManager

    normal = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    of = "decoder_" if config.is_encoder_decoder and normal.has_attribute("decoder_num_layers") else ""
    layers = int(getattr(normal, f"{of}num_layers"))
    heads = int(getattr(normal, f"{of}num_attention_heads"))
    size = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or int(normal.hidden_size) // heads
    return layers, heads, int(size)


def _cache_inputs(of: str, layers: Any, heads: int, size: int, length: int, axis: str) -> dict[str, Input]:
    each = ((BATCH, heads, length, size), torch.float32, {0: "batch_size", 2: axis})
    numbers = range(layers) if isinstance(layers, int) else layers
    return {f"past_key_values.{i}.{of}{what}": each for i in numbers for what in ("key", "value")}


def _cache_outputs(of: str, layers: Any, axis: str) -> dict[str, Axes]:
    numbers = range(layers) if isinstance(layers, int) else layers
    return {f"present.{i}.{of}{what}": {0: "batch_size", 2: axis} for i in numbers for what in ("key", "value")}


def _filled(values: Any) -> Any:
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


def _contents(cache: Any) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]
