"""On a GPU: sessions that really run there, with CUDA graphs and a cache in place, and what NVML says meanwhile."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto as T

from lora_export import benchmarking
from lora_export.benchmarking import environment, sessions
from lora_export.benchmarking.buffers import Buffers, Shape
from lora_export.benchmarking.gpus import Gpus
from lora_export.contracts import BenchmarkArm, BenchmarkOptions
from lora_export.onnx_export.graphs.identity import compare
from lora_export.progress import Silent
from lora_export.runtime import why_not

from .test_benchmark_run import attention

pytestmark = [pytest.mark.gpu, pytest.mark.timing]


@pytest.fixture(autouse=True)
def cuda() -> None:
    reason = why_not("cuda")
    if reason:
        pytest.skip(f"no CUDA here: {reason}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return attention(tmp_path / "model.onnx", T.FLOAT16)


def test_gpu_runs_every_heavy_node(model: Path) -> None:
    assert sessions.misplaced(model, "cuda", 1, Shape(1, 16, 1), None) == ()
    found = compare([model], [model], "cuda")
    assert found.identical and found.placement["CUDAExecutionProvider"] > 0


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_gpu_in_place_step_matches_cpu_logits(model: Path, cuda_graph: bool) -> None:
    wide = attention(model.with_name("wide.onnx"))
    engine = sessions.ArmSession(model, "cuda", 1, cuda_graph=cuda_graph)
    assert engine.kv_in_place

    def logits(engine: sessions.ArmSession, device: str) -> np.ndarray:
        buffers = Buffers(device)
        bound = engine.call(Shape(2, 7, 1), buffers)
        for _ in range(4):
            bound.run()
        (value,) = [v for key, v in buffers.values.items() if key[0] == "logits"]
        return value.numpy().astype(np.float32)

    expected = logits(sessions.ArmSession(wide, "cpu", 1), "cpu")
    np.testing.assert_allclose(logits(engine, "cuda"), expected, atol=0.02 * np.abs(expected).max())


def test_gpu_study_has_both_modes_and_readings(model: Path) -> None:
    arms = [BenchmarkArm("base", (model,)), BenchmarkArm("merged", (model,))]
    options = BenchmarkOptions("cuda", ((1, 16),), margin=0.5, max_seconds=8)
    result = benchmarking.run(arms, options=options, progress=Silent())
    assert result.provider == "cuda" and result.provider_verified, result.notes
    assert {c.cuda_graph for c in result.cells} == {False, True}, result.notes
    assert result.verdict != "slower"
    (card, *_) = next(iter(result.conditions.values()))[0].gpus
    assert card.used_mb and card.used_mb > 0
    assert environment.memory("cuda", Gpus())[0] > 0
