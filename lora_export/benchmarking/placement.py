"""Where a session's nodes really ran: `get_providers()` only lists what was registered, a profile shows it."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# TensorRT leaves what it cannot build to CUDA; that is still the GPU.
_ACCEPTED = {
    "CPUExecutionProvider": {"CPUExecutionProvider"},
    "CUDAExecutionProvider": {"CUDAExecutionProvider"},
    "TensorrtExecutionProvider": {"TensorrtExecutionProvider", "CUDAExecutionProvider"},
}
_SHAPE_TYPES = {"int32", "int64", "bool"}
_SHAPE_ELEMENTS = 64


def strays(events: Iterable[Mapping[str, Any]], provider: str) -> tuple[str, ...]:
    """Heavy nodes of a profile that ran elsewhere than on `provider` (its long name), each once.

    Not heavy: results of at most 64 integers or booleans, which is how ONNX computes shapes. ONNX Runtime
    keeps those on the CPU on purpose. Copies between devices count as heavy unless they are as small.
    A profile without a single node on the provider is a stray as a whole.
    """
    nodes = [e for e in events if e.get("cat") == "Node" and _where(e)]
    accepted = _ACCEPTED.get(provider, {provider})
    labels = {_label(e) for e in nodes if _where(e) not in accepted and not _computes_shape(e)}
    if not any(_where(e) == provider for e in nodes):
        labels.add(f"no node ran on {provider}")
    return tuple(sorted(labels))


def profile_events(path: Path) -> list[dict[str, Any]]:
    events = json.loads(path.read_text(encoding="utf-8"))
    return [e for e in events if isinstance(e, dict)]


def _where(event: Mapping[str, Any]) -> str:
    return str(event.get("args", {}).get("provider", ""))


def _computes_shape(event: Mapping[str, Any]) -> bool:
    outputs = event["args"].get("output_type_shape")
    if not outputs:
        return False
    return all(
        kind in _SHAPE_TYPES and math.prod(shape) <= _SHAPE_ELEMENTS
        for output in outputs
        for kind, shape in output.items()
    )


def _label(event: Mapping[str, Any]) -> str:
    name = str(event.get("name", "")).removesuffix("_kernel_time")
    return f"{event['args'].get('op_name', 'node')} {name} ran on {_where(event)}"
