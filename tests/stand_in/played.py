"""CUDA and TensorRT played by the CPU: what this project does with them runs, and their faults can be had.

Sessions say what sessions on a GPU say: their providers, who runs which node, and a profile in which shapes are
computed on the CPU. Nothing that is measured here says anything of a GPU.

In this process: `install(Faults(...))`. In child processes: this folder in PYTHONPATH and the faults as JSON in the
variable CUDA_PLAYED_BY_CPU, "{}" for none.
"""

import contextlib
import importlib.abc
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIABLE = "CUDA_PLAYED_BY_CPU"
HERE = Path(__file__).resolve().parent
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_SHAPES = ("int64", "int32", "bool")
_NO_MEMORY = "Failed to allocate memory for requested buffer of size"


@dataclass(frozen=True)
class Faults:
    """What goes wrong. compiled: whether the providers are compiled in; library: one that cannot be loaded, so that
    ONNX Runtime falls back and says so on stderr; silent: it falls back without a word; stray: an operator that
    runs on the CPU, between two copies; capture: stems of models that cannot run as CUDA graphs,
    and when they fail: "opening" or "running"; memory: bytes of the largest model that fits; breaks: the provider
    fails at the first run, after which ONNX Runtime falls back unless it is forbidden to."""

    compiled: bool = True
    library: str = ""
    silent: bool = False
    stray: str = ""
    capture: Mapping[str, str] = field(default_factory=dict)
    memory: int = 0
    breaks: bool = False


def install(faults: Faults, replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """In this process. replace: as setattr; monkeypatch.setattr puts everything back."""
    import onnxruntime as ort

    present = [TENSORRT, CUDA, CPU] if faults.compiled else [CPU]
    replace(ort, "get_available_providers", lambda: list(present))
    replace(ort, "preload_dlls", lambda **_: None)
    replace(ort, "InferenceSession", _session(ort, faults))
    for name, place in (("ortvalue_from_numpy", 1), ("ortvalue_from_shape_and_type", 2)):
        replace(ort.OrtValue, name, _on_cpu(getattr(ort.OrtValue, name), place))


def variables(faults: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What child processes need in their environment."""
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: json.dumps(dict(faults or {})), "PYTHONPATH": os.pathsep.join(path)}


def on_import() -> None:
    """`install` as soon as ONNX Runtime is imported here, and in the processes of engines."""
    sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        after = _AFTER.get(name)
        if after is None:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        loaded = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            loaded(module)
            after(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def with_stand_in(clean: Callable[[str], dict[str, str]]) -> Callable[[str], dict[str, str]]:
    """The environment that engines get, with this folder in it."""

    def environment(scratch: str) -> dict[str, str]:
        made = clean(scratch)
        return made | {"PYTHONPATH": os.pathsep.join([str(HERE), made["PYTHONPATH"]])}

    return environment


def _into_engines(isolated: Any) -> None:
    isolated._environment = with_stand_in(isolated._environment)


def _card(torch: Any) -> None:
    """The card of `merge --device cuda`; other commands would ask it for more than is played."""
    if "--device" not in sys.argv:
        return
    to = torch.Tensor.to
    torch.cuda.is_available = lambda: True
    torch.Tensor.to = lambda self, *to_what, **how: to(self, *("cpu" if w == "cuda" else w for w in to_what), **how)


_AFTER: Mapping[str, Callable[[Any], None]] = {
    "onnxruntime": lambda module: install(Faults(**json.loads(os.environ[VARIABLE]))),
    "lora_export.onnx_export.engines.isolated": _into_engines,
    "torch": _card,
}


def _on_cpu(real: Any, place: int) -> Any:
    """The same function of ONNX Runtime; its argument at `place` names a device."""

    def made(*args: Any, **kw: Any) -> Any:
        device = ["cpu" if a == "cuda" else a for a in args[place : place + 1]]
        return real(*args[:place], *device, *args[place + 1 :], **kw)

    return made


def _session(ort: Any, faults: Faults) -> Any:
    errors = ort.capi.onnxruntime_pybind11_state
    real = getattr(ort.InferenceSession, "played", ort.InferenceSession)  # not a played one that plays

    class Binding(ort.IOBinding):  # type: ignore[misc]
        def bind_output(self, name: str, device_type: str = "cpu", *rest: Any, **kw: Any) -> None:
            super().bind_output(name, "cpu" if device_type == "cuda" else device_type, *rest, **kw)

    class Session(real):  # type: ignore[misc]
        played = real

        def __init__(
            self, model: Any, sess_options: Any = None, providers: Any = None, *rest: Any, **kw: Any
        ) -> None:
            asked = dict((p, {}) if isinstance(p, str) else p for p in providers or [])
            self._plays = next((p for p in asked if p in (CUDA, TENSORRT)), "")
            self._stem = Path(model).stem if isinstance(model, (str, Path)) else "probe"
            self._graph = asked.get(self._plays, {}).get("enable_cuda_graph") == "1"
            self._broken = bool(self._plays) and faults.breaks
            if self._plays:
                self._refuse(model)
            if sess_options is not None and self._plays:
                sess_options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
            with _runnable(model) as path:
                super().__init__(path, sess_options, [CPU], *rest, **kw)

        def _refuse(self, model: Any) -> None:
            if not faults.compiled or faults.silent:
                self._plays = ""
            if faults.library:
                told = f"{faults.library}: cannot open shared object file"
                sys.stderr.write(
                    f"[E:onnxruntime] Failed to load library libonnxruntime_cuda.so with error: {told}\n"
                )
                self._plays = ""
            size = Path(model).parent if isinstance(model, (str, Path)) else None
            held = sum(p.stat().st_size for p in size.glob(f"{Path(model).name}*")) if size else 0
            if faults.memory and held > faults.memory:
                raise errors.RuntimeException(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {_NO_MEMORY} {held}")
            if self._graph and faults.capture.get(self._stem) == "opening":
                raise errors.Fail(
                    "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature"
                )

        def get_providers(self) -> list[str]:
            return [self._plays, CPU] if self._plays else list(super().get_providers())

        def io_binding(self) -> Any:
            return Binding(self)

        def run(self, *args: Any, **kw: Any) -> Any:
            self._fail()
            return super().run(*args, **kw)

        def run_with_ort_values(self, *args: Any, **kw: Any) -> Any:
            self._fail()
            return super().run_with_ort_values(*args, **kw)

        def run_with_iobinding(self, binding: Any, run_options: Any = None) -> None:
            self._fail()
            number = run_options.get_run_config_entry("gpu_graph_id") if self._graph and run_options else "-1"
            if number != "-1" and faults.capture.get(self._stem) == "running":
                raise errors.Fail("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 900: stream is capturing\nand more")
            super().run_with_iobinding(binding, run_options)

        def _fail(self) -> None:
            """As ONNX Runtime: an EPFail turns into a session on the CPU where that is not forbidden."""
            if not self._broken:
                return
            if not self._enable_fallback:
                raise errors.EPFail("CUDA failure 719: unspecified launch failure")
            self._broken, self._plays = False, ""

        def end_profiling(self) -> str:
            path = super().end_profiling()
            if self._plays:
                events = _as_on_gpu(json.loads(Path(path).read_text()), self._plays, faults.stray)
                Path(path).write_text(json.dumps(events))
            return str(path)

        def get_provider_graph_assignment_info(self) -> Sequence[Any]:
            parts = super().get_provider_graph_assignment_info()
            return [SimpleNamespace(ep_name=self._plays or p.ep_name, get_nodes=p.get_nodes) for p in parts]

    return Session


@contextlib.contextmanager
def _runnable(model: Any) -> Iterator[Any]:
    """The graph, or a copy without the operators that CUDA alone has."""
    if not isinstance(model, (str, Path)) or b"GroupNorm" not in Path(model).read_bytes():
        yield model
        return
    import onnx_ir as ir

    from lora_export.graph_runs.taken_apart import take_apart

    graph = ir.load(model)
    take_apart(graph)
    with tempfile.NamedTemporaryFile(dir=Path(model).parent, suffix=".onnx", delete=False) as copy:
        pass
    try:
        ir.save(graph, copy.name)
        yield copy.name
    finally:
        Path(copy.name).unlink()


def _as_on_gpu(events: list[dict[str, Any]], provider: str, stray: str) -> list[dict[str, Any]]:
    """The profile, with each node where it would run: shapes and strays on the CPU, the rest on the provider."""
    told: list[dict[str, Any]] = []
    for event in events:
        args = event.get("args", {})
        if event.get("cat") != "Node" or args.get("provider") != CPU:
            told.append(event)
            continue
        outputs = args.get("output_type_shape") or []
        shapes = outputs and all(kind in _SHAPES and len(dims) <= 1 for o in outputs for kind, dims in o.items())
        away = bool(stray) and args.get("op_name") == stray
        here = {**event, "args": {**args, "provider": CPU if shapes or away else provider}}
        copies = [
            {**event, "name": f"{event['name']}_{to}", "args": {**args, "op_name": to, "provider": provider}}
            for to in ("MemcpyToHost", "MemcpyFromHost")
        ]
        told += [copies[0], here, copies[1]] if away else [here]
    return told
