"""Providers are tried, not listed."""

import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora_export import runtime
from lora_export.contracts import ExportResult
from lora_export.errors import InputError, RuntimeUnavailable
from lora_export.graph_runs.runs import GraphRun
from lora_export.graph_runs.signature import numpy_dtype


@pytest.fixture
def no_cuda() -> None:
    if runtime.why_not("cuda") is None:
        pytest.skip("CUDA works here")


@pytest.mark.usefixtures("no_cuda")
def test_provider_absent_cuda_is_refused_quickly(capfd: pytest.CaptureFixture[str]) -> None:
    runtime.why_not.cache_clear()
    start = time.monotonic()
    with pytest.raises(RuntimeUnavailable, match=r"cuda execution provider does not work here: .") as refusal:
        runtime.resolve_provider("cuda")
    assert time.monotonic() - start < 20
    assert "driver" in (refusal.value.next_step or "")
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("no_cuda")
def test_provider_auto_falls_back_to_cpu() -> None:
    assert runtime.resolve_provider("auto") == "cpu"


def test_provider_unknown_name_is_refused() -> None:
    assert runtime.resolve_provider("cpu") == "cpu"
    with pytest.raises(InputError, match="'npu'"):
        runtime.resolve_provider("npu")


def test_provider_probe_that_hangs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PROBE_SECONDS", 0.01)
    runtime.why_not.cache_clear()
    try:
        assert "did not finish" in (runtime.why_not("cpu") or "")
    finally:
        runtime.why_not.cache_clear()


def test_providers_report_has_reason_for_failure() -> None:
    rows = runtime.providers_report()
    assert [row["provider"] for row in rows] == ["cpu", "cuda", "tensorrt"]
    assert rows[0]["works"]
    assert all(row["works"] == (row["reason"] is None) for row in rows)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "[E:x] Failed to load library a.so with error: libb.so: cannot open\nREASON fallback off",
            "libb.so: cannot open",
        ),
        ("REASON X is not compiled into this onnxruntime", "X is not compiled into this onnxruntime"),
        ("Segmentation fault", "Segmentation fault"),
    ],
)
def test_provider_failure_reason_is_extracted(stderr: str, reason: str) -> None:
    assert runtime._reason(stderr) == reason


@pytest.mark.usefixtures("no_cuda")
def test_session_never_falls_back(exported: Callable[..., ExportResult], llama: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="fell back to CPUExecutionProvider"):
        runtime.open_session(exported(llama).model, "cuda")


def test_session_model_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff")
    with pytest.raises(RuntimeUnavailable, match="cannot open the model") as failure:
        runtime.open_session(tmp_path / "model.onnx", "cpu")
    assert failure.value.where == str(tmp_path / "model.onnx")


def test_numpy_dtype_of_onnx_types() -> None:
    assert numpy_dtype("tensor(float)") == np.float32
    assert numpy_dtype("tensor(float16)") == np.float16
    assert numpy_dtype("tensor(int64)") == np.int64
    assert numpy_dtype("tensor(bfloat16)") == np.dtype(ml_dtypes.bfloat16)


def test_decoder_signature_of_encoder_is_none(exported: Callable[..., ExportResult], bert: Path) -> None:
    with pytest.raises(InputError, match="not a decoder with a KV cache"):
        GraphRun(exported(bert).model).signature.require_cache()
