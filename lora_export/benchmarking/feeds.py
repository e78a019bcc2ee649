"""Made-up inputs, from a seed: what they say makes no difference to the time they take."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_export import runtime
from lora_export.benchmarking.buffers import ELEMENT, Shape
from lora_export.errors import InputError

Array = np.ndarray[Any, Any]

_INTEGERS = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
_TOKENS = ("input_ids", "attention_mask", "encoder_attention_mask", "position_ids", "token_type_ids")
_IDS = 64  # no vocabulary is smaller
_SAMPLES = 320  # of a wave at 16 kHz, for each position of wav2vec 2


def values(name: str, given: Any, shape: Shape, seed: int) -> Array:
    """An array for the input `name`; given: its type and dimensions as a session tells them."""
    if given.type not in _INTEGERS:
        return _signal(name, given, shape, seed)
    dtype = _INTEGERS[given.type]
    if name == "encoder_attention_mask":
        return np.ones((shape.batch, shape.past), dtype)
    if "mask" in name:
        return np.ones((shape.batch, shape.total), dtype)
    if name == "position_ids":
        return np.tile(np.arange(shape.past, shape.total, dtype=dtype), (shape.batch, 1))
    if name == "token_type_ids":
        return np.zeros((shape.batch, shape.tokens), dtype)
    return tokens(shape, seed).astype(dtype)


def tokens(shape: Shape, seed: int) -> Array:
    """Token ids (batch, tokens)."""
    return np.random.default_rng(seed).integers(0, _IDS, (shape.batch, shape.tokens))


def refuse_unknown(inputs: Mapping[str, Any], model: Path) -> None:
    """InputError for inputs that nothing here can make up."""
    odd = [
        f"{name} ({given.type})"
        for name, given in inputs.items()
        if given.type not in ELEMENT or (given.type in _INTEGERS and name not in _TOKENS)
    ]
    if odd:
        raise InputError(
            f"inputs that the benchmark does not know: {', '.join(odd)}",
            where=model,
            expected=f"{', '.join(_TOKENS)}, caches, and images or sounds as floating-point numbers",
        )


def _signal(name: str, given: Any, shape: Shape, seed: int) -> Array:
    """Seeded numbers for images, sounds, states of an encoder and caches. A sequence is as long as the prompt,
    a wave as long as the sound of so many tokens."""
    dims = [d if isinstance(d, int) else _length(d, shape) for d in given.shape]
    if name == "input_values":
        dims[-1] *= _SAMPLES
    numbers = np.random.default_rng(seed).standard_normal([shape.batch, *dims[1:]], np.float32)
    return numbers.astype(runtime.numpy_dtype(given.type))


def _length(name: str | None, shape: Shape) -> int:
    """Of a dimension with this name: past tokens and those of an encoder make up the prompt of a step."""
    return shape.past if name and ("past" in name or "encoder" in name) else shape.tokens
