"""Weights of a gptq export are judged by what comes out on the calibration texts, and their stated errors anew."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_export.errors import ExportError
from lora_export.onnx_export.quantize import gptq
from lora_export.onnx_export.weights.map import Quantization
from lora_export.validation.graphs import weights as graph_weights
from lora_export.validation.graphs.moments import NAME, Moments
from lora_export.validation.graphs.numbers import judged
from lora_export.validation.graphs.stated import NAME as STATED
from lora_export.validation.graphs.stated import Stated
from lora_export.validation.graphs.weights import Held, Quantized

OUT, IN, SIZE = 48, 128, 32
Arrays = dict[str, np.ndarray]


def inputs(seed: int) -> np.ndarray:
    """Moments of inputs that hang together, as those of a layer do: (IN, IN)."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(1024, 24)) @ draw.normal(size=(24, IN)) + 0.7 * draw.normal(size=(1024, IN))
    rows *= np.exp(draw.normal(size=IN))
    return rows.T @ rows / len(rows)


def statistics(folder: Path, **matrices: np.ndarray) -> Moments:
    """calibration.safetensors with the moments of tensors of OUT rows."""
    tensors: dict[str, torch.Tensor] = {}
    for name, matrix in matrices.items():
        diagonal = matrix.diagonal()
        correlations = matrix / np.sqrt(np.outer(diagonal, diagonal))
        key = f"{name}[0:{OUT}]"
        tensors[f"{key}.diagonal"] = torch.from_numpy(diagonal.astype(np.float32))
        tensors[f"{key}.triangle"] = torch.from_numpy(correlations[np.triu_indices(IN)].astype(np.float16))
    pieces = {f"{name}[0:{OUT}]": f"{name}[0:{OUT}]" for name in matrices}
    save_file(tensors, folder / NAME, metadata={"pieces": json.dumps(pieces)})
    found = Moments.beside(folder)
    assert found is not None
    return found


class Made:
    """A matrix that was quantized with the moments of "own", or of another layer, or without any."""

    def __init__(self, folder: Path, method: Any = "int4", symmetric: bool = False, by: str | None = "own") -> None:
        self.how = Quantization(method, "packed", SIZE, symmetric, "gptq")
        self.moments = statistics(folder, own=inputs(1), other=inputs(2))
        self.wanted = np.random.default_rng(3).normal(size=(OUT, IN)).astype(np.float32)
        turned, scales = np.ascontiguousarray(self.wanted.T), np.dtype(np.float32)
        if by is None:
            self.arrays, self.errors = gptq.rounded(turned, self.how, scales)
        else:
            moment = self.moments.of(f"{by}[0:{OUT}]")
            assert moment is not None
            self.arrays, self.errors = gptq.Solver(moment.numpy().copy()).quantize(turned, self.how, scales)
        self.name = "own" if by else "table"

    def held(self, arrays: Mapping[str, np.ndarray]) -> Held:
        how = {"method": self.how.method, "block_size": SIZE}
        values = graph_weights._dequantized(arrays, OUT, IN, how)
        kind = Quantized(
            self.how.method, SIZE, self.how.symmetric, 1, IN, "gptq", f"{self.name}[0:{OUT}]", "data", ("packed",)
        )
        return Held(self.name, 0, OUT, values, torch.float32, 0.0, kind)

    def error(self, arrays: Mapping[str, np.ndarray] | None = None, wanted: np.ndarray | None = None) -> float:
        exact = torch.from_numpy(self.wanted if wanted is None else wanted)
        return judged(self.held(arrays or self.arrays), exact, None, self.moments)[0]


@pytest.mark.parametrize("method", ["int4", "int8"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("by", ["own", None])
def test_judged_gptq_weights_as_quantized_pass(
    tmp_path: Path, method: str, symmetric: bool, by: str | None
) -> None:
    assert Made(tmp_path, method, symmetric, by).error() <= 1


def changed(arrays: Arrays, part: str, change: Callable[[np.ndarray], None]) -> Arrays:
    copy = {k: v.copy() for k, v in arrays.items()}
    change(copy[part])
    return copy


def swap_rows(array: np.ndarray) -> None:
    array[[0, 1]] = array[[1, 0]]


def one_zero_point(array: np.ndarray) -> None:
    array[5, 0] += 1 if array[5, 0] & 0xF < 15 else -1


def no_number(array: np.ndarray) -> None:
    array[7, 2] = np.nan


def one_scale(array: np.ndarray) -> None:
    array[5, 1] *= 1.05


FAULTS: dict[str, Callable[[Arrays], Arrays]] = {
    "rows exchanged": lambda a: {k: changed(a, k, swap_rows)[k] for k in a},
    "nibbles exchanged": lambda a: a | {"packed": a["packed"] >> 4 | a["packed"] << 4},
    "blocks exchanged": lambda a: a | {"packed": a["packed"][:, ::-1].copy()},
    "every zero point off by one": lambda a: a | {"zero_points": a["zero_points"] ^ 0x11},
    "one zero point off by one": lambda a: changed(a, "zero_points", one_zero_point),
    "a scale that is no number": lambda a: changed(a, "scales", no_number),
    "every scale 5 % off": lambda a: a | {"scales": a["scales"] * np.float32(1.05)},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("by", ["own", None])
def test_judged_gptq_weights_with_fault_fail(tmp_path: Path, fault: str, by: str | None) -> None:
    made = Made(tmp_path, by=by)
    assert not made.error(FAULTS[fault](made.arrays)) <= 1


def test_judged_gptq_weights_of_another_layer_fail(tmp_path: Path) -> None:
    made = Made(tmp_path)
    assert made.error(wanted=np.random.default_rng(4).normal(size=(OUT, IN)).astype(np.float32)) > 1


def test_judged_gptq_weights_by_statistics_of_another_layer_fail(tmp_path: Path) -> None:
    assert Made(tmp_path, by="other").error() > 1


def test_judged_gptq_weights_whose_statistics_are_missing_fail(tmp_path: Path) -> None:
    """As rounded to nearest, which they are not."""
    made = Made(tmp_path)
    made.moments = statistics(tmp_path, other=inputs(2))
    assert made.error() > 1


# --- what quantization.json states ------------------------------------------------------------------------------


def stated(made: Made, folder: Path, **changes: float | None) -> Stated:
    errors = made.errors
    share = {"weight_error": (errors.lost / errors.weights) ** 0.5, "output_error": None}
    if errors.outputs:
        share["output_error"] = (errors.outputs_lost / errors.outputs) ** 0.5
    entry = {"name": "packed", "file": "data"} | share | changes
    (folder / STATED).write_text(json.dumps({"weights": [entry]}), encoding="utf-8")
    found = Stated.beside(folder)
    assert found is not None
    return found


def check(made: Made, said: Stated, arrays: Arrays | None = None) -> Any:
    held = made.held(arrays or made.arrays)
    _, sums = judged(held, torch.from_numpy(made.wanted), None, made.moments)
    assert held.quantized is not None
    said.add(held.quantized, sums() if sums else None)
    return said.check("onnx_quantization_errors")


@pytest.mark.parametrize("by", ["own", None])
def test_stated_errors_of_honest_export_pass(tmp_path: Path, by: str | None) -> None:
    made = Made(tmp_path, by=by)
    assert check(made, stated(made, tmp_path)).passed


@pytest.mark.parametrize("changes", [{"weight_error": 0.11}, {"output_error": 0.01}, {"output_error": None}])
def test_stated_errors_that_differ_fail(tmp_path: Path, changes: dict[str, float | None]) -> None:
    made = Made(tmp_path)
    found = check(made, stated(made, tmp_path, **changes))
    assert not found.passed and found.value == 1
    assert f"the first: packed, {next(iter(changes)).replace('_', ' ')}" in found.note


def test_stated_errors_of_one_changed_scale_fail(tmp_path: Path) -> None:
    """Which changes the outputs by less than gptq itself differs from row to row."""
    made = Made(tmp_path)
    arrays = changed(made.arrays, "scales", one_scale)
    assert made.error(arrays) <= 1
    assert not check(made, stated(made, tmp_path), arrays).passed


def test_stated_errors_without_the_weight_fail(tmp_path: Path) -> None:
    made = Made(tmp_path)
    (tmp_path / STATED).write_text('{"weights": []}', encoding="utf-8")
    said = Stated.beside(tmp_path)
    assert said is not None and not check(made, said).passed


def test_stated_errors_without_counterpart_are_not_judged(tmp_path: Path) -> None:
    made = Made(tmp_path)
    said, kind = stated(made, tmp_path), made.held(made.arrays).quantized
    assert kind is not None
    said.add(kind, None)
    assert not said.check("x").passed  # nothing was judged
    assert said.check("x").value == 0


# --- the file of statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t | {"own[0:48].triangle": torch.full_like(t["own[0:48].triangle"], 2)},
        lambda t: t | {"own[0:48].diagonal": -t["own[0:48].diagonal"]},
        lambda t: t | {"own[0:48].diagonal": t["own[0:48].diagonal"][1:]},
        lambda t: t | {"own[0:48].diagonal": t["own[0:48].diagonal"] * float("nan")},
    ],
    ids=["no correlations", "negative squares", "another size", "no numbers"],
)
def test_moments_that_cannot_be_are_refused(tmp_path: Path, spoil: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file

    statistics(tmp_path, own=inputs(1))
    save_file(spoil(load_file(tmp_path / NAME)), tmp_path / NAME, metadata={"pieces": '{"own[0:48]": "own[0:48]"}'})
    found = Moments.beside(tmp_path)
    with pytest.raises(ExportError, match="the statistics have"):
        assert found is not None and found.of("own[0:48]") is None


def test_moments_of_damaged_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(ExportError, match="the statistics have no table"):
        Moments.beside(tmp_path)


def test_judged_moments_of_another_width_fail(tmp_path: Path) -> None:
    made = Made(tmp_path)
    held = made.held(made.arrays)
    assert held.quantized is not None
    half = replace(held, values=held.values[:, :64], quantized=replace(held.quantized, width=64))
    assert judged(half, torch.from_numpy(made.wanted[:, :64].copy()), None, made.moments)[0] == float("inf")
