"""CUDA and TensorRT played by the CPU (tests/stand_in): every decision that a GPU asks of a benchmark, and each way
in which one fails, is told. The device itself is for test_benchmark_gpu.py."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto as T

from lora_export import benchmarking, runtime
from lora_export.benchmarking import environment, pytorch, sessions
from lora_export.benchmarking.arms import OpenedArms
from lora_export.benchmarking.buffers import Buffers, Shape
from lora_export.benchmarking.pytorch import TorchStep
from lora_export.contracts import BenchmarkArm, BenchmarkOptions, BenchmarkResult
from lora_export.errors import RuntimeUnavailable
from lora_export.graph_runs.runs import GraphRun
from lora_export.onnx_export.graphs.identity import compare
from lora_export.progress import Silent
from tests.benchmarking.test_benchmark_run import attention, graph
from tests.stand_in import played as stand_in

Played = Callable[..., None]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return attention(tmp_path / "base.onnx", T.FLOAT16)


def study(model: Path, provider: str = "cuda", *more: BenchmarkArm) -> BenchmarkResult:
    merged = model.with_name("merged.onnx")
    merged.write_bytes(model.read_bytes())
    arms = [BenchmarkArm("base", (model,)), BenchmarkArm("merged", (merged,)), *more]
    options = BenchmarkOptions(provider, ((1, 12),), margin=0.5, max_seconds=0.4)
    return benchmarking.run(arms, options=options, progress=Silent())


# --- where the nodes run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_played_every_heavy_node_is_on_provider(played: Played, model: Path, provider: str) -> None:
    played()
    assert sessions.misplaced(model, provider, 1, Shape(1, 8, 1), None) == ()
    found = compare([model], [model], provider)
    assert found.identical and set(found.placement) == {runtime.PROVIDERS[provider]}
    result = study(model, provider)
    assert result.provider == provider and result.provider_verified, result.notes
    assert {cell.cuda_graph for cell in result.cells} == ({False, True} if provider == "cuda" else {False})


def test_played_node_on_cpu_and_its_copies_are_told(played: Played, model: Path) -> None:
    played(stray="MatMul")
    result = study(model)
    assert not result.provider_verified
    strays = [note for note in result.notes if "ran on CPUExecutionProvider" in note]
    assert {note.split()[0] for note in strays} == {"base:", "merged:"}
    assert all(": MatMul " in note for note in strays)


def test_played_no_node_on_provider_is_told(played: Played, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played()
    monkeypatch.setattr(stand_in, "_as_on_gpu", lambda events, *_: events)
    assert any("no node ran on CUDAExecutionProvider" in note for note in study(model).notes)


# --- falling back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [{"compiled": False}, {"library": "libcublasLt.so.13"}, {"silent": True}])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_played_session_that_falls_back_is_refused(
    played: Played, model: Path, provider: str, faults: dict[str, object]
) -> None:
    played(**faults)
    with pytest.raises(RuntimeUnavailable, match="fell back to CPUExecutionProvider"):
        study(model, provider)


def test_played_provider_that_fails_in_a_run_does_not_fall_back(played: Played, tmp_path: Path) -> None:
    played(breaks=True)
    run = GraphRun(graph(tmp_path / "model.onnx", 1, decoder=False), "cuda")
    with pytest.raises(Exception, match="CUDA failure 719"):
        run.arrays({n: np.ones((1, 2), np.int64) for n in ("input_ids", "attention_mask", "token_type_ids")})
    assert run.session.get_providers()[0] == "CUDAExecutionProvider"


def test_played_benchmark_that_fails_in_a_run_ends(played: Played, model: Path) -> None:
    played(breaks=True)
    with pytest.raises(Exception, match="CUDA failure 719"):
        study(model)


# --- CUDA graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["opening", "running"])
@pytest.mark.parametrize("arm", ["base", "merged", "unmerged"])
def test_played_failed_capture_is_told_and_other_cells_stay(
    played: Played, model: Path, when: str, arm: str
) -> None:
    played(capture={arm: when})
    control = model.with_name("unmerged.onnx")
    control.write_bytes(model.read_bytes())
    result = study(model, "cuda", BenchmarkArm("unmerged", (control,)))
    assert any(f"no CUDA graph of {arm}" in note for note in result.notes)
    captured = [cell for cell in result.cells if cell.cuda_graph]
    assert len(result.cells) - len(captured) == 2
    assert len(captured) == (2 if arm == "unmerged" else 0)
    assert all("unmerged" not in cell.arms for cell in captured)


def test_played_step_in_place_under_capture_computes_the_same(played: Played, model: Path) -> None:
    played()
    logits = []
    for provider, cuda_graph in (("cpu", False), ("cuda", False), ("cuda", True)):
        arm = sessions.ArmSession(model, provider, 1, cuda_graph=cuda_graph)
        assert arm.kv_in_place and arm.device == provider
        buffers = Buffers(arm.device)
        arm.call(Shape(2, 7, 1), buffers, graph_id=3).run()
        logits += [v.numpy() for key, v in buffers.values.items() if key[0] == "logits"]
    np.testing.assert_array_equal(logits[1], logits[0])
    np.testing.assert_array_equal(logits[2], logits[0])


# --- PyTorch -----------------------------------------------------------------------------------------------


def test_played_pytorch_arm_is_on_the_card_and_waited_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, waited = list[object](), list[str]()
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or to(self, "cpu"))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("cuda"))
    step = torch.nn.Identity()
    arm = TorchStep(lambda device: lambda given: step.to(device)(given), model, "tensorrt", 1)
    monkeypatch.setattr(pytorch, "step_feed", lambda *_: {"x": np.ones(2, np.float32)})
    assert arm.device == "cuda"
    arm.call(Shape(1, 0, 4), Buffers("cpu")).run()
    assert set(moved) == {"cuda"} and waited == ["cuda"]


def test_played_pytorch_arm_has_no_cuda_graph_of_its_own(played: Played, model: Path, monkeypatch: Any) -> None:
    played()
    opened: list[bool] = []

    def never(arms: Any, arm: BenchmarkArm, part: int) -> Any:
        opened.append(arms.cuda_graph)
        return sessions.ArmSession(model, "cuda", 1)

    real = OpenedArms._open
    monkeypatch.setattr(OpenedArms, "_open", lambda *a: never(*a) if a[1].pytorch else real(*a))
    result = study(model, "cuda", BenchmarkArm("pytorch", pytorch=(tmp := model.parent, tmp)))
    assert opened == [False]
    assert [("pytorch" in cell.arms) for cell in result.cells if not cell.cuda_graph] == [True, True]


# --- memory ------------------------------------------------------------------------------------------------


def test_played_model_larger_than_the_card_is_told(played: Played, model: Path) -> None:
    played(memory=1000)
    with pytest.raises(RuntimeUnavailable, match=r"cannot open the model on cuda.*Failed to allocate memory"):
        study(model)


# --- the probe, in a process of its own ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ("{}", ""),
        ('{"compiled": false}', "CUDAExecutionProvider is not compiled into this onnxruntime"),
        ('{"library": "libcublasLt.so.13"}', "libcublasLt.so.13: cannot open shared object file"),
        ('{"silent": true}', "disabled fallback to the CPU EP"),
        ('{"breaks": true}', "CUDA failure 719: unspecified launch failure"),
    ],
)
def test_played_probe_tells_why_cuda_does_not_work(
    faults: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (stand_in.variables() | {stand_in.VARIABLE: faults}).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", runtime._PROBE, "CUDAExecutionProvider"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (not reason), done.stderr
    assert reason in runtime._reason(done.stderr)
