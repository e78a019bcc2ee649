"""Which nodes of a profile count as not being where they should."""

from typing import Any

import pytest

from lora_export.benchmarking.placement import strays

CUDA, CPU, TRT = "CUDAExecutionProvider", "CPUExecutionProvider", "TensorrtExecutionProvider"


def node(op: str, provider: str, kind: str = "float16", shape: tuple[int, ...] = (1, 576)) -> dict[str, Any]:
    args = {"op_name": op, "provider": provider, "output_type_shape": [{kind: list(shape)}]}
    return {"cat": "Node", "name": f"/layer/{op}_kernel_time", "args": args}


def test_placement_all_on_gpu_passes() -> None:
    assert strays([node("MatMul", CUDA), node("GroupQueryAttention", CUDA)], CUDA) == ()


def test_placement_shape_arithmetic_on_cpu_passes() -> None:
    events = [node("MatMul", CUDA), node("Shape", CPU, "int64", (2,)), node("Cast", CPU, "int32", ())]
    assert strays(events, CUDA) == ()


@pytest.mark.parametrize(
    "stray",
    [
        node("MatMul", CPU),
        node("MatMulNBits", CPU, "float", (4,)),
        node("Gather", CPU, "int64", (1, 2048)),
        node("MemcpyToHost", CPU, "float", (1, 3, 128, 64)),
    ],
)
def test_placement_heavy_nodes_on_cpu_are_named_once(stray: dict[str, Any]) -> None:
    found = strays([node("MatMul", CUDA), stray, stray], CUDA)
    assert len(found) == 1
    assert stray["args"]["op_name"] in found[0] and CPU in found[0] and "_kernel_time" not in found[0]


def test_placement_node_of_unknown_output_is_heavy() -> None:
    event = node("Custom", CPU)
    del event["args"]["output_type_shape"]
    assert len(strays([node("MatMul", CUDA), event], CUDA)) == 1


def test_placement_nothing_on_provider_is_fallback() -> None:
    assert any("no node ran on" in s for s in strays([node("MatMul", CPU)], CUDA))
    assert strays([], CUDA) == (f"no node ran on {CUDA}",)


def test_placement_tensorrt_may_use_cuda_not_cpu() -> None:
    assert strays([node("TRTKernel", TRT), node("MatMul", CUDA)], TRT) == ()
    assert len(strays([node("TRTKernel", TRT), node("MatMul", CPU)], TRT)) == 1


def test_placement_events_without_node_are_ignored() -> None:
    session = {"cat": "Session", "name": "model_run", "args": {}}
    kernel = {"cat": "Kernel", "name": "gemm", "args": {"provider": CPU, "op_name": "x"}}
    assert strays([session, kernel, node("MatMul", CUDA)], CUDA) == ()
