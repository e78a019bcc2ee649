"""Between the types of checkpoints and those of ONNX, in numpy: to fp32, and rounded to nearest, ties to even."""

import functools
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# safetensors' name of a type → numpy's
STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
# ONNX's name (as weights maps have it) → numpy's
ONNX: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64), "int64": np.dtype(np.int64), "int32": np.dtype(np.int32),
    "int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8), "bool": np.dtype(np.bool_),
}  # fmt: skip
_CHUNK = 2**15  # elements that stay in the processor's cache between the passes over them
_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # every half there is


def to_float32(values: Array) -> Array:
    """The same numbers in fp32 (of fp64, the nearest). numpy converts halves one by one in software."""
    if values.dtype == np.float16:
        return np.take(_HALF, values.view(np.uint16), mode="clip")  # which, unlike others, copies no index
    return values.astype(np.float32, copy=False)


def cast(values: Array, dtype: np.dtype[Any]) -> Array:
    """Numbers of one type in another, rounded once; of fp64 by way of fp32."""
    if values.dtype == ml_dtypes.bfloat16 and dtype == np.float16:
        return np.take(_halves_of_bfloat16(), values.view(np.uint16), mode="clip")
    return rounded(to_float32(values), dtype)


@functools.cache
def _halves_of_bfloat16() -> Array:
    """The half of every bfloat16 there is."""
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    return rounded(to_float32(every), np.dtype(np.float16))


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """fp32 numbers in another type; values beyond the largest half become infinite, as everywhere."""
    if dtype == np.float16:
        return _to_half(values)
    return values.astype(dtype, copy=False)


def _to_half(values: Array) -> Array:
    source = np.ascontiguousarray(values, np.float32).reshape(-1)
    out = np.empty(source.size, np.uint16)
    for start in range(0, source.size, _CHUNK):
        out[start : start + _CHUNK] = _half_bits(source[start : start + _CHUNK])
    return out.view(np.float16).reshape(values.shape)


def _half_bits(values: Array) -> Array:
    """By the bits of IEEE 754: rebias the exponent, and let the addition carry the rounding.

    Below the smallest normal half, adding ½ in fp32 leaves a unit in the last place that is a half's, and rounds.
    """
    bits = values.view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    odd = (size >> np.uint32(13)) & np.uint32(1)
    half = (size + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)
    small = size < np.uint32(0x38800000)
    if small.any():
        with np.errstate(invalid="ignore"):  # of signalling NaNs, which are not small
            tiny = (size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
        half = np.where(small, tiny, half)
    large = size >= np.uint32(0x47800000)
    if large.any():
        beyond = np.where(size > np.uint32(0x7F800000), np.uint32(0x7E00), np.uint32(0x7C00))
        half = np.where(large, beyond, half)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    return (half | sign).astype(np.uint16)
