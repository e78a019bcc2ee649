"""Between fp32 and the halves: torch's own bits, for every half that there is and for what lies between two."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.onnx_export.weights.dtypes import ONNX, STORED, cast, rounded, to_float32
from lora_export.onnx_export.weights.map import ITEM_SIZE

Array = np.ndarray[Any, Any]
EVERY = np.arange(2**16, dtype=np.uint16)
HALVES = [(np.dtype(np.float16), torch.float16), (np.dtype(ml_dtypes.bfloat16), torch.bfloat16)]
TYPES = pytest.mark.parametrize(("ours", "theirs"), HALVES, ids=["fp16", "bf16"])
# fp32, by its bits: what becomes a subnormal half or none, the largest half and what is beyond it, infinities.
EDGES = [
    0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x33000000, 0x33000001, 0x33800000, 0x33C00000, 0x387FC000,
    0x387FE000, 0x387FEFFF, 0x387FF000, 0x38800000, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000, 0x7F7F7FFF,
    0x7F7F8000, 0x7F7FFFFF, 0x7F800000,
]  # fmt: skip
NANS = [0x7F800001, 0x7F801000, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF]


def by_torch(bits: Array, dtype: torch.dtype) -> Array:
    """Bits of fp32 numbers → bits of the same numbers in a half type."""
    single = torch.from_numpy(bits.view(np.float32).copy())
    return np.asarray(single.to(dtype).view(torch.uint16).numpy())


def check_rounding(bits: Array, ours: Any, theirs: torch.dtype) -> None:
    found = rounded(bits.view(np.float32), ours)
    assert found.dtype == ours
    expected = by_torch(bits, theirs)
    nan = np.isnan(bits.view(np.float32))
    np.testing.assert_array_equal(found.view(np.uint16)[~nan], expected[~nan])
    assert np.isnan(found[nan].astype(np.float32)).all()  # which one of them is nobody's business
    assert (np.signbit(found) == (bits >> 31).astype(bool))[nan].all()


@TYPES
def test_cast_every_half_to_fp32(ours: Any, theirs: torch.dtype) -> None:
    """Signalling NaNs, too: a load must not fail on them."""
    expected = torch.from_numpy(EVERY.copy()).view(theirs).float().numpy()
    found = to_float32(EVERY.view(ours))
    assert found.dtype == np.float32
    nan = np.isnan(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(found[nan]).all()
    assert nan.sum() == (2046 if theirs is torch.float16 else 254)


@TYPES
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
def test_cast_every_half_to_other_half(ours: Any, theirs: torch.dtype, target: str) -> None:
    """In two dimensions, as weights come."""
    expected = torch.from_numpy(EVERY.copy()).view(theirs).to(getattr(torch, target)).float().numpy()
    found = cast(EVERY.view(ours).reshape(256, 256), ONNX[target])
    assert found.dtype == ONNX[target] and found.shape == (256, 256)
    wide, nan = found.reshape(-1).astype(np.float32), np.isnan(expected)
    np.testing.assert_array_equal(wide.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(wide[nan]).all()


@TYPES
def test_cast_every_half_round_trips(ours: Any, theirs: torch.dtype) -> None:
    found = rounded(to_float32(EVERY.view(ours)), ours).view(np.uint16)
    number = ~np.isnan(to_float32(EVERY.view(ours)))
    np.testing.assert_array_equal(found[number], EVERY[number])


@TYPES
def test_cast_ties_round_to_even(ours: Any, theirs: torch.dtype) -> None:
    """The middle goes to the even one; a step beside it, to the nearer: subnormals, and beyond the largest, too."""
    halves = to_float32(EVERY.view(ours)).astype(np.float64)
    finite = np.sort(halves[np.isfinite(halves)])
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    for bits in (middle.view(np.uint32), np.nextafter(middle, np.float32(np.inf)).view(np.uint32)):
        check_rounding(bits, ours, theirs)
    check_rounding(np.nextafter(middle, -np.float32(np.inf)).view(np.uint32), ours, theirs)


@TYPES
def test_cast_range_ends_saturate(ours: Any, theirs: torch.dtype) -> None:
    positive = np.array([*EDGES, *NANS], np.uint32)
    check_rounding(np.concatenate((positive, positive | np.uint32(0x80000000))), ours, theirs)


@TYPES
@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_cast_any_fp32_matches_reference(ours: Any, theirs: torch.dtype, bits: list[int]) -> None:
    check_rounding(np.array(bits, np.uint32), ours, theirs)


@TYPES
@pytest.mark.parametrize("size", [0, 1, 2**15 - 1, 2**15, 2**15 + 1, 3 * 2**15 + 7])
def test_cast_any_length_matches_reference(ours: Any, theirs: torch.dtype, size: int) -> None:
    """Longer than what is rounded in one go."""
    check_rounding(np.random.default_rng(size).integers(0, 2**32, size, np.uint32), ours, theirs)


@TYPES
def test_cast_transposed_keeps_shape(ours: Any, theirs: torch.dtype) -> None:
    matrix = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    expected = torch.from_numpy(matrix).T.to(theirs).float().numpy()
    np.testing.assert_array_equal(to_float32(rounded(matrix.T, ours)), expected)
    assert rounded(np.float32(1.5).reshape(()), ours).shape == ()


def test_cast_fp64_rounds_to_fp32() -> None:
    """Halfway between two fp32 numbers, and beyond the largest."""
    values = np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, 2.0**-150, 1e300, -1e300, np.nan, 1 / 3])
    with np.errstate(over="ignore"):
        found = to_float32(values)
    np.testing.assert_array_equal(found, torch.from_numpy(values).float().numpy())


def test_cast_tables_have_every_type() -> None:
    assert {name: dtype.itemsize for name, dtype in ONNX.items()} == ITEM_SIZE
    assert {str(d) for d in STORED.values()} == {str(d) for d in ONNX.values()}
