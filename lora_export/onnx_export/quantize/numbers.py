"""Blockwise weight quantization with ONNX Runtime's own quantizers, for MatMulNBits and MatMulBnb4.

A matrix (in, out), as ONNX's MatMul has it, is cut along `in` into blocks that share a scale. Columns are
independent, so a matrix can be quantized a few columns at a time with the same result. The bytes are those of
onnxruntime.quantization's MatMulNBitsQuantizer and MatMulBnb4Quantizer, with two exceptions: for a matrix of one
block (in ≤ block_size), their k_quant sums in memory order; and their rtn and k_quant cannot pack int4 zero points
of an odd number of blocks.
"""

from collections.abc import Mapping

import numpy as np

from lora_export.onnx_export.weights.dtypes import Array
from lora_export.onnx_export.weights.map import Part, Quantization

BITS = {"int4": 4, "int8": 8}
_BNB4 = {"fp4": 0, "nf4": 1}
# Values of codes in a block whose largest number is 1 (blockwise_quant_block_bnb4.h in ONNX Runtime's MLAS).
_FP4 = (0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_CODES = {
    "fp4": (*_FP4, *(-n for n in _FP4)),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ),
}  # fmt: skip


def quantize(matrix: Array, how: Quantization) -> dict[Part, Array]:
    """The arrays for the operator of `how`: packed numbers, scales, and zero points if there are any.

    matrix: fp32 or fp16 (in, out); the scales get its type. MatMulNBits: packed (out, blocks, block_size · bits /
    8) uint8, scales (out, blocks), zero points (out, ⌈blocks · bits / 8⌉) uint8. MatMulBnb4: packed (⌈in · out /
    2⌉,) uint8, scales (⌈in · out / block_size⌉,).
    """
    if how.method in _BNB4:
        return _bnb4(matrix, how)
    bits, rows = BITS[how.method], matrix.shape[0]
    blocks = -(-rows // how.block_size)
    missing = blocks * how.block_size - rows
    padded = np.ascontiguousarray(np.pad(matrix, ((0, missing), (0, 0))) if missing else matrix)
    if how.algorithm == "default":
        return _default(padded, rows, bits, how)
    return _searched(padded, bits, how)


def dequantize(arrays: Mapping[Part, Array], rows: int, columns: int, how: Quantization) -> Array:
    """The matrix (rows, columns) in fp32 that the operator multiplies by; arrays: the result of `quantize`."""
    scales = arrays["scales"].astype(np.float32)
    if how.method in _BNB4:
        codes = _halves(arrays["packed"])[..., ::-1].reshape(-1)[: rows * columns]  # the first is in the upper half
        matrix = np.array(_CODES[how.method], np.float32)[codes]
        matrix *= np.repeat(scales, how.block_size)[: rows * columns]
        return np.ascontiguousarray(matrix.reshape(columns, rows).T)
    bits, blocks = BITS[how.method], -(-rows // how.block_size)
    numbers = arrays["packed"].reshape(columns, blocks, -1)
    points = arrays.get("zero_points")
    if bits == 4:
        numbers = _halves(numbers).reshape(columns, blocks, how.block_size)
        points = None if points is None else _halves(points).reshape(columns, -1)[:, :blocks]
    zeros = np.float32(2 ** (bits - 1)) if points is None else points.astype(np.float32)[..., None]
    matrix = (numbers.astype(np.float32) - zeros) * scales[..., None]
    return np.ascontiguousarray(matrix.reshape(columns, -1)[:, :rows].T)


def _halves(packed: Array) -> Array:
    """The two 4-bit numbers of each byte, the lower first, in a new last dimension."""
    return np.stack((packed & 0xF, packed >> 4), axis=-1)


def granularity(rows: int, how: Quantization) -> int:
    """Columns (of `rows` numbers) that must be quantized together: one, unless blocks continue from column to
    column, as bitsandbytes has it."""
    if how.method not in _BNB4:
        return 1
    columns = 1
    while rows * columns % how.block_size or rows * columns % 2:
        columns *= 2
        if columns > how.block_size:
            break
    return columns


def shapes(rows: int, columns: int, how: Quantization) -> dict[Part, tuple[int, ...]]:
    """The shapes of the arrays that `quantize` makes of a whole matrix (rows, columns)."""
    if how.method in _BNB4:
        count = rows * columns
        return {"packed": (-(-count // 2),), "scales": (-(-count // how.block_size),)}
    bits, blocks = BITS[how.method], -(-rows // how.block_size)
    arrays: dict[Part, tuple[int, ...]] = {
        "packed": (columns, blocks, how.block_size * bits // 8),
        "scales": (columns, blocks),
    }
    if not how.symmetric:
        arrays["zero_points"] = (columns, -(-blocks * bits // 8))
    return arrays


def _default(padded: Array, rows: int, bits: int, how: Quantization) -> dict[Part, Array]:
    """MLAS: the scale of a block from its largest number (symmetric), or from its range."""
    from onnxruntime.capi import _pybind_state as native

    columns, blocks = padded.shape[1], padded.shape[0] // how.block_size
    packed = np.zeros((columns, blocks, how.block_size * bits // 8), np.uint8)
    scales = np.zeros((columns, blocks), padded.dtype)
    zero_points = np.zeros((columns, -(-blocks * bits // 8)), np.uint8)
    run = native.quantize_matmul_8bits if bits == 8 else native.quantize_matmul_4bits
    run(packed, padded, scales, zero_points, how.block_size, columns, rows, how.symmetric)
    arrays: dict[Part, Array] = {"packed": packed, "scales": scales}
    return arrays if how.symmetric else arrays | {"zero_points": zero_points}


def _searched(padded: Array, bits: int, how: Quantization) -> dict[Part, Array]:
    """rtn: rounded to nearest; k_quant: the scale and zero point with the least weighted error, as in llama.cpp."""
    from onnxruntime.quantization.neural_compressor import weight_only

    columns, blocks = padded.shape[1], padded.shape[0] // how.block_size
    turned = np.ascontiguousarray(padded.T)
    if how.algorithm == "k_quant":
        with np.errstate(divide="ignore", invalid="ignore"):  # a block of equal numbers, whose result is not used
            numbers, scales, zeros = weight_only.quant_tensor_k_quant_cpu(turned, bits, how.block_size)
    else:
        scheme = "sym" if how.symmetric else "asym"
        numbers, scales, zeros = weight_only.quant_tensor(turned, bits, how.block_size, scheme, "uint", 1)
    codes = numbers.reshape(columns, blocks * how.block_size).T
    points = None if how.symmetric else zeros.reshape(columns, blocks).T
    return packed(codes, scales.reshape(columns, blocks).T, points, how, padded.dtype)


def packed(
    codes: Array, scales: Array, zeros: Array | None, how: Quantization, dtype: np.dtype[np.generic]
) -> dict[Part, Array]:
    """The arrays of MatMulNBits for codes (in, out), and scales and zero points (blocks, out); dtype: of scales."""
    bits, (blocks, columns) = BITS[how.method], scales.shape
    missing = blocks * how.block_size - len(codes)
    whole = np.pad(codes, ((0, missing), (0, 0))) if missing else codes
    numbers = np.ascontiguousarray(whole.astype(np.uint8).T).reshape(columns, blocks, how.block_size)
    arrays: dict[Part, Array] = {
        "packed": numbers if bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4,
        "scales": np.ascontiguousarray(scales.T.astype(dtype)),
    }
    if zeros is None:
        return arrays
    points = np.ascontiguousarray(zeros.T.astype(np.uint8))
    if bits == 4:
        even = np.full((columns, -(-blocks // 2) * 2), 8, np.uint8)  # half a byte is unused
        even[:, :blocks] = points
        points = even[:, ::2] | even[:, 1::2] << 4
    return arrays | {"zero_points": points}


def _bnb4(matrix: Array, how: Quantization) -> dict[Part, Array]:
    """bitsandbytes' 4-bit numbers: blocks of the transposed matrix, one column after another."""
    from onnxruntime.capi import _pybind_state as native

    rows, columns = matrix.shape
    turned = np.ascontiguousarray(matrix.T)
    packed = np.zeros(-(-rows * columns // 2), np.uint8)
    scales = np.zeros(-(-rows * columns // how.block_size), matrix.dtype)
    native.quantize_matmul_bnb4(packed, turned, scales, how.block_size, _BNB4[how.method], columns, rows)
    return {"packed": packed, "scales": scales}
