"""Encoder-decoders: the encoder, the first step of the decoder, and its later steps.

What they read and cache is found by calling them on tensors without values, not from a table of architectures.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.errors import ExportError
from lora_export.onnx_export.engines.parts import shapes
from lora_export.onnx_export.engines.parts.graph_part import (
    BATCH,
    ENCODED,
    LENGTH,
    PAST,
    Axes,
    GraphPart,
    Input,
    takes,
)

_WAVE, _FRAMES = 16_000, 104  # samples and frames of sounds to trace with
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
_STEP, _OWN, _CROSS = "decoder_sequence_length", "past_decoder_sequence_length", "encoder_sequence_length"


@dataclass(frozen=True)
class _Encoder:
    """module: of the model; inputs: what it reads; returns: the type of its result, whose width is that of its
    states."""

    module: Any
    inputs: Mapping[str, Input]
    returns: type
    width: int

    @property
    def masked(self) -> bool:
        return "attention_mask" in self.inputs


def parts(model: Any) -> tuple[GraphPart, ...]:
    """encoder_model, decoder_model and decoder_with_past_model, with Optimum's names of inputs and outputs."""
    encoder = _encoder(model)
    return _encoding(encoder), *_decoders(model, encoder)


def task(model: Any, name: str) -> str:
    """Optimum's name of a task. transformers has BART among the models that fill masks, too, and one name for all
    that read pictures."""
    return {"input_ids": "text2text-generation", "pixel_values": "image-to-text"}.get(_main_input(model), name)


# --- the encoder -------------------------------------------------------------------------------------------


def _encoding(encoder: _Encoder) -> GraphPart:
    module, names = encoder.module, list(encoder.inputs)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module(**dict(zip(names, values, strict=True))).last_hidden_state,)

    sized = len(encoder.inputs[names[0]][2]) > 1
    outputs = {"last_hidden_state": {0: "batch_size", 1: _CROSS} if sized else {0: "batch_size"}}
    return GraphPart("encoder_model.onnx", "encoder_model.onnx_data", run, encoder.inputs, outputs)


def _encoder(model: Any) -> _Encoder:
    """ExportError if it runs on no input of the shapes that its configuration suggests."""
    module, name = model.get_encoder(), _main_input(model)
    masked = takes(model, "attention_mask") and takes(module, "attention_mask")
    for main in _shapes(getattr(module, "config", model.config), name):
        shape, _, axes = main
        # The mask of what is read, which Optimum and transformers.js give the decoder, too.
        lengths = {1: axes[max(axes)]} if max(axes) else {}
        mask: Input = ((shape[0], shape[max(axes) or -1]), torch.int64, {0: "batch_size", **lengths})
        inputs = {name: main} | ({"attention_mask": mask} if masked else {})
        result = _result(module, inputs)
        if result is None:
            continue
        if "attention_mask" in result:  # it makes another mask for the decoder, which cannot make it itself
            inputs.pop("attention_mask", None)
        return _Encoder(module, inputs, type(result), int(result.last_hidden_state.shape[-1]))
    raise ExportError(
        f"{type(module).__name__} does not run on {name} of any shape that its configuration suggests",
        where="config.json",
        expected="token ids, pictures of image_size, waves, or spectra with num_mel_bins",
    )


def _main_input(model: Any) -> str:
    """What the encoder reads: input_ids, input_features, input_values or pixel_values."""
    encoder = model.get_encoder()
    named = (getattr(encoder, "main_input_name", None), model.main_input_name)
    return next((str(name) for name in named if name and takes(encoder, name)), "input_ids")


def _shapes(config: Any, name: str) -> Iterator[Input]:
    """Shapes that the input may have, to be tried in turn."""
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        yield (BATCH, getattr(config, "num_channels", 3), height, width), torch.float32, {0: "batch_size"}
    elif name == "input_values":
        yield (BATCH, _WAVE), torch.float32, {0: "batch_size", 1: "sequence_length"}
    elif name == "input_features":
        bins = next((int(getattr(config, n)) for n in _BINS if getattr(config, n, None)), 80)
        yield (BATCH, _FRAMES, bins), torch.float32, {0: "batch_size", 1: "sequence_length"}
        yield (BATCH, bins, _FRAMES), torch.float32, {0: "batch_size", 2: "sequence_length"}
        # Whisper's convolutions halve the frames, and it takes as many as it has positions for.
        frames = 2 * getattr(config, "max_source_positions", 0)
        yield (BATCH, bins, frames), torch.float32, {0: "batch_size"}
    else:
        yield (BATCH, ENCODED), torch.int64, {0: "batch_size", 1: _CROSS}


def _result(module: Any, inputs: Mapping[str, Input]) -> Any:
    """What an encoder returns, without values; None if it does not take such inputs."""
    with shapes.shapes_only():
        given = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype, _) in inputs.items()}
        try:
            return shapes.call(module, **given)
        except (RuntimeError, ValueError, IndexError, TypeError):  # however a model refuses a shape
            return None


# --- the decoder -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cached:
    """A tensor of the cache. cross: whether it is made of the encoder's states."""

    name: str
    heads: int
    size: int
    cross: bool

    def as_input(self) -> Input:
        length, axis = (ENCODED, _CROSS) if self.cross else (PAST, _OWN)
        return (BATCH, self.heads, length, self.size), torch.float32, {0: "batch_size", 2: axis}

    def as_output(self, length: str) -> Axes:
        return {0: "batch_size", 2: _CROSS if self.cross else length}


def _decoders(model: Any, encoder: _Encoder) -> tuple[GraphPart, GraphPart]:
    """The first step, which computes the keys and values of the encoder's states, and all later steps.

    These are two graphs with the same weights, in one data file.
    """
    encoded: Axes = {0: "batch_size", 1: _CROSS}
    inputs: dict[str, Input] = {"input_ids": ((BATCH, LENGTH), torch.int64, {0: "batch_size", 1: _STEP})}
    if encoder.masked:
        _, dtype, axes = encoder.inputs["attention_mask"]
        inputs["encoder_attention_mask"] = ((BATCH, ENCODED), dtype, axes)
    plain = list(inputs)
    states: Input = ((BATCH, ENCODED, encoder.width), torch.float32, encoded)
    cached = _cached(model, encoder, inputs | {"encoder_hidden_states": states})

    def first(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip([*plain, "encoder_hidden_states"], values, strict=True))
        result = _step(model, encoder, given, None)
        return (result.logits, *_in_turn(result.past_key_values))

    def later(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(plain, values[: len(plain)], strict=True))
        past = list(zip(cached, values[len(plain) :], strict=True))
        own, cross = ([value for c, value in past if c.cross is which] for which in (False, True))
        # The cache has what was encoded; the model only asks for its shape.
        given["encoder_hidden_states"] = torch.zeros((cross[0].shape[0], cross[0].shape[2], encoder.width))
        result = _step(model, encoder, given, (own, cross))
        return (result.logits, *_contents(result.past_key_values.self_attention_cache))

    logits: dict[str, Axes] = {"logits": {0: "batch_size", 1: _STEP}}
    first_outputs = logits | {f"present.{c.name}": c.as_output(_STEP) for c in cached}
    with_past = inputs | {f"past_key_values.{c.name}": c.as_input() for c in cached}
    grown = f"{_OWN} + {_STEP}"
    later_outputs = logits | {f"present.{c.name}": c.as_output(grown) for c in cached if not c.cross}
    data = "decoder_model.onnx_data"
    inputs["encoder_hidden_states"] = states
    return (
        GraphPart("decoder_model.onnx", data, first, inputs, first_outputs, caches=True),
        GraphPart("decoder_with_past_model.onnx", data, later, with_past, later_outputs, caches=True),
    )


def _step(model: Any, encoder: _Encoder, given: Mapping[str, torch.Tensor], past: Any, run: Any = None) -> Any:
    """What the model returns for ids, encoded states and their mask. past: own and cross tensors in turn."""
    from transformers import EncoderDecoderCache

    own, cross = past or ((), ())
    arguments = {
        "encoder_outputs": encoder.returns(last_hidden_state=given["encoder_hidden_states"]),
        "decoder_input_ids": given["input_ids"],
        "past_key_values": EncoderDecoderCache(_filled(own), _filled(cross)),
        "use_cache": True,
    }
    if encoder.masked:
        arguments["attention_mask"] = given["encoder_attention_mask"]
    return (run or model)(**arguments)


def _cached(model: Any, encoder: _Encoder, inputs: Mapping[str, Input]) -> list[_Cached]:
    """What the model itself caches in a first step, in Optimum's order."""
    with shapes.shapes_only():
        given = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype, _) in inputs.items()}
        cache = _step(model, encoder, given, None, lambda **a: shapes.call(model, **a)).past_key_values
        found = [(name, tensor.shape, cross) for name, tensor, cross in _named(cache)]
    return [_Cached(name, int(shape[1]), int(shape[3]), cross) for name, shape, cross in found]


def _named(cache: Any) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name, tensor, and whether it is made of the encoder's states, layer by layer."""
    of = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
    tensors = {which: _contents(part) for which, part in of.items()}
    for i in range(len(cache.self_attention_cache.layers)):
        for which, values in tensors.items():
            for what, tensor in zip(("key", "value"), values[2 * i : 2 * i + 2], strict=False):
                yield f"{i}.{which}.{what}", tensor, which == "encoder"


def _in_turn(cache: Any) -> Sequence[torch.Tensor]:
    return [tensor for _, tensor, _ in _named(cache)]


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
