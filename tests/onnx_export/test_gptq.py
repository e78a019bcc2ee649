"""GPTQ: codes against a plain implementation of the algorithm, and errors against the definition."""

from typing import Any

import numpy as np
import pytest

from lora_export.onnx_export.quantize import gptq
from lora_export.onnx_export.quantize.gptq import Solver, rounded
from lora_export.onnx_export.quantize.numbers import dequantize, quantize
from lora_export.onnx_export.weights.map import Quantization

F32 = np.dtype(np.float32)
INT4 = Quantization("int4", "packed", 32, False, "gptq")
Array = np.ndarray[Any, np.dtype[Any]]


def inputs(count: int, seed: int = 0) -> Array:
    """(tokens, count): correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((4 * count, count)) @ rng.standard_normal((count, count)) / count**0.5
    return mixed * np.exp(rng.standard_normal(count))


def moment_of(x: Array) -> Array:
    return x.T @ x / len(x)


def matrix(rows: int, columns: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def naive(weights: Array, moment: Array, scales: Array, zeros: Array, size: int) -> Array:
    """Codes by the textbook: invert H again for every input that is left, and move what is left at once."""
    h = moment.copy()
    own = gptq.OWN_DAMPING * moment.diagonal()
    h[np.diag_indices_from(h)] += own + gptq.DAMPING * moment.diagonal().mean()
    order, left = list(np.argsort(-h.diagonal(), kind="stable")), weights.astype(np.float64)
    codes = np.empty_like(left)
    while order:
        first = order[0]
        inverse = np.linalg.inv(h[np.ix_(order, order)])
        scale, zero = scales[first // size], zeros[first // size]
        codes[first] = np.clip(np.rint(left[first] / scale + zero), 0, 15)
        error = left[first] - (codes[first] - zero) * scale
        left[order] -= np.outer(inverse[0] / inverse[0, 0], error)
        order = order[1:]
    return codes


@pytest.mark.parametrize("rows", [96, 80])
def test_solver_codes_equal_textbook(rows: int) -> None:
    weights, moment = matrix(rows, 24), moment_of(inputs(rows))
    arrays, _ = Solver(moment.copy()).quantize(weights, INT4, F32)
    scales, packed = arrays["scales"].astype(np.float64).T, arrays["packed"]
    found = np.stack((packed & 15, packed >> 4), -1).reshape(24, -1)[:, :rows].T
    points = np.stack((arrays["zero_points"] & 15, arrays["zero_points"] >> 4), -1).reshape(24, -1).T[: len(scales)]
    np.testing.assert_array_equal(found, naive(weights, moment, scales, points.astype(float), 32))


@pytest.mark.parametrize("how", [INT4, Quantization("int8", "packed", 64, True, "gptq")], ids=["int4", "int8"])
def test_solver_errors_are_those_of_definition(how: Quantization) -> None:
    weights, x = matrix(128, 40), inputs(128)
    arrays, errors = Solver(moment_of(x)).quantize(weights, how, F32)
    change = weights.astype(np.float64) - dequantize(arrays, 128, 40, how)
    for stated, true in (
        (errors.weights, np.sum(weights.astype(np.float64) ** 2)), (errors.lost, np.sum(change**2)),
        (errors.outputs, np.sum((x @ weights) ** 2) / len(x)),
        (errors.outputs_lost, np.sum((x @ change) ** 2) / len(x)),
    ):  # fmt: skip
        assert stated == pytest.approx(true, rel=1e-3)


def test_solver_outputs_change_less_than_by_rounding() -> None:
    weights, x = matrix(128, 40), inputs(128)
    solved, _ = Solver(moment_of(x)).quantize(weights, INT4, F32)
    nearest, _ = rounded(weights, INT4, F32)
    lost = [np.sum((x @ (weights - dequantize(a, 128, 40, INT4))) ** 2) for a in (solved, nearest)]
    assert lost[0] < 0.4 * lost[1]


def test_solver_takes_outputs_in_any_pieces() -> None:
    weights, moment = matrix(64, 48), moment_of(inputs(64))
    solver = Solver(moment)
    whole, errors = solver.quantize(weights, INT4, F32)
    parts = [solver.quantize(weights[:, i : i + 16], INT4, F32) for i in (0, 16, 32)]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([p[name] for p, _ in parts]))
    assert errors.outputs_lost == pytest.approx(sum(e.outputs_lost for _, e in parts))


def test_solver_input_that_texts_never_show_is_rounded_to_nearest() -> None:
    x = inputs(64)
    x[:, 5] = 0
    arrays, _ = Solver(moment_of(x)).quantize(matrix(64, 8), INT4, F32)
    change = matrix(64, 8)[5] - dequantize(arrays, 64, 8, INT4)[5]
    assert np.all(np.abs(change) <= arrays["scales"][:, 0] * 0.75)


def test_solver_indefinite_moment_gets_more_damping() -> None:
    moment = moment_of(inputs(64))
    moment -= np.eye(64) * 0.1 * np.linalg.eigvalsh(moment)[-1]
    arrays, errors = Solver(moment).quantize(matrix(64, 8), INT4, F32)
    assert np.isfinite(arrays["scales"]).all()
    assert errors.lost < 0.1 * errors.weights


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounded_matrix_of_zeros_stays_zero(dtype: Any) -> None:
    arrays, errors = rounded(np.zeros((64, 8), dtype), INT4, np.dtype(dtype))
    assert arrays["scales"].dtype == dtype
    assert np.all(arrays["scales"] > 0)
    assert not dequantize(arrays, 64, 8, INT4).any()
    assert errors.lost == 0


def test_rounded_grid_loses_less_than_whole_range() -> None:
    weights = matrix(64, 64)
    plain = Quantization("int4", "packed", 32, False, "rtn")
    arrays = rounded(weights, INT4, F32)[0], quantize(weights, plain)
    lost = [np.sum((weights - dequantize(a, 64, 64, INT4)) ** 2) for a in arrays]
    assert lost[0] < 0.97 * lost[1]
