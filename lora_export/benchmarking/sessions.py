"""Sessions whose every input and output is bound to a buffer, and the calls that are timed."""

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora_export import runtime
from lora_export.benchmarking.buffers import ELEMENT, Buffers, Shape
from lora_export.benchmarking.placement import profile_events, strays
from lora_export.graph_runs import denoiser, feeds
from lora_export.graph_runs.runs import to_numpy
from lora_export.graph_runs.signature import LOGITS, Signature

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue

# Without this, the idle threads of one arm spin on the cores that the next arm is timed on.
_STOP_SPINNING = "1"
_NO_CAPTURE = -1
_SAY_NOTHING = 4  # ONNX Runtime's severity: fatal errors only
_TRIAL = Shape(1, 8, 1)
_SAME = 0.02  # of the largest logit: half precision in another order of additions, and far from another cache

Values = dict[str, "OrtValue"]


@dataclass(frozen=True)
class Bound:
    """Something that can be timed: run() does it once and returns milliseconds until the device is done.

    kv_in_place: a step writes its keys and values into the buffer of the cache, instead of copying it; disturbs:
    it slows down what runs right after it.
    """

    run: Callable[[], float]
    kv_in_place: bool = False
    disturbs: bool = False


class OpenedArm(Protocol):
    """What a cell needs of an arm: a session of ONNX Runtime, or PyTorch."""

    device: str

    @property
    def is_decoder(self) -> bool: ...

    @property
    def is_denoiser(self) -> bool: ...

    def call(self, shape: Shape, buffers: Buffers, graph_id: int = 1, seed: int = 0) -> Bound: ...


class ArmSession:
    """A session opened for measuring. provider: cpu, cuda or tensorrt; adapter: an .onnx_adapter file, whose
    tensors are inputs of every run."""

    def __init__(
        self,
        model: Path,
        provider: str,
        threads: int,
        *,
        adapter: Path | None = None,
        cuda_graph: bool = False,
        profile: Path | None = None,
    ) -> None:
        options = runtime.session_options()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", _STOP_SPINNING)
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        graph = {"enable_cuda_graph": "1"} if cuda_graph else {}
        self.session: InferenceSession = runtime.open_session(
            model, provider, options=options, provider_options=graph
        )
        self.cuda_graph = cuda_graph
        self.device = "cpu" if provider == "cpu" else "cuda"
        self._adapter = _Adapter(adapter) if adapter else None
        self._signature = Signature.of_session(self.session)
        self._inputs = self._signature.inputs
        past = [name for name, value in self._inputs.items() if value.is_cache]
        # The decoder of an encoder-decoder cannot fill its own caches: they are inputs like any other.
        alone = not any("encoder" in name or "cross" in name for name in self._inputs)
        self._past = past if alone else []
        if self._past:
            self._signature.require_cache()
        if not self.is_denoiser:
            feeds.refuse_unknown(self._signature)

    @property
    def is_decoder(self) -> bool:
        """Whether one graph does both a prompt and a step."""
        return bool(self._past)

    @property
    def is_denoiser(self) -> bool:
        return denoiser.is_denoiser(self._signature)

    def call(self, shape: Shape, buffers: Buffers, graph_id: int = 1, seed: int = 0) -> Bound:
        """Bind `shape` to fixed buffers. One run beforehand, uncaptured, finds the shapes of the outputs; arms that
        declare the same ones share what it found.

        Each shape of a session with CUDA graphs needs a `graph_id` of its own.
        """
        if self.kv_in_place:
            cache = self._one_cache(shape, buffers, seed)
            outputs = {self._signature.cache[name]: value for name, value in cache.items()}
        else:
            cache, outputs = self._cache(shape, buffers, seed), {}
        inputs = self._others(shape, buffers, seed) | cache
        declared = tuple((o.name, o.type, tuple(o.shape)) for o in self.session.get_outputs())
        sizes = buffers.outputs.get((shape, declared, *outputs))
        if sizes is None:
            # Only what is still unknown is taken: dims and element type, not the device's memory.
            found = {n: v for n, v in self._run_unbound(inputs, outputs).items() if n not in outputs}
            sizes = {n: (v.element_type(), tuple(v.shape())) for n, v in found.items()}
            buffers.outputs[shape, declared, *outputs] = sizes
        bound = self._binding(inputs, outputs | {name: buffers.blank(name, *size) for name, size in sizes.items()})
        return Bound(_timed(self.session, bound, self._run_options(graph_id)), self.kv_in_place)

    @functools.cached_property
    def kv_in_place(self) -> bool:
        """Whether keys and values can be written into the buffer that holds the past ones.

        Tried on a short prompt, not read from the graph: a step in place must give the logits of a step that
        copies.
        """
        if not self._past:
            return False
        buffers = Buffers(self.device)
        others = self._others(_TRIAL, buffers, 0)
        apart = self._run_unbound(others | self._cache(_TRIAL, buffers, 0), {}, trial=True)
        try:
            cache = self._one_cache(_TRIAL, buffers, 0, trial=True)
            outputs = {self._signature.cache[name]: value for name, value in cache.items()}
            together = self._run_unbound(others | cache, outputs, trial=True)
        except Exception:  # ONNX Runtime's classes share no base but this one; a graph that concatenates comes here
            return False
        expected, in_place = (
            to_numpy(run[LOGITS], self._signature.outputs[LOGITS].dtype).astype(np.float32)
            for run in (apart, together)
        )
        return bool(np.abs(in_place - expected).max() <= _SAME * np.abs(expected).max())

    def _run_unbound(self, inputs: Values, outputs: Values, *, trial: bool = False) -> Values:
        """Run once; ONNX Runtime allocates the outputs that are not given. Returns all outputs by name.

        trial: a failure is not logged, and the outputs that are not given lie on the CPU.
        """
        binding = self._binding(inputs, outputs)
        rest = [o.name for o in self.session.get_outputs() if o.name not in outputs]
        for name in rest:
            binding.bind_output(name, "cpu" if trial else self.device, 0)
        self.session.run_with_iobinding(binding, self._run_options(_NO_CAPTURE, trial))
        binding.synchronize_outputs()
        # ONNX Runtime lists outputs in the order in which they were bound.
        return dict(zip([*outputs, *rest], binding.get_outputs(), strict=True))

    def _binding(self, inputs: Values, outputs: Values) -> "IOBinding":
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return binding

    def _others(self, shape: Shape, buffers: Buffers, seed: int) -> Values:
        """All inputs but the cache."""
        if self.is_denoiser:
            feed = denoiser.step_feed(self._signature, shape.batch, shape.tokens, seed)
            return {n: buffers.array(n, shape, array) for n, array in feed.items()}
        others = [value for name, value in self._inputs.items() if name not in self._past]
        sizes = feeds.Sizes(shape.batch, shape.tokens, shape.past, shape.past, feeds.SAMPLES * shape.tokens)
        made = {n: buffers.array(n, shape, array) for n, array in feeds.made_up(others, sizes, seed).items()}
        return made | (self._adapter.values if self._adapter else {})

    def _cache(self, shape: Shape, buffers: Buffers, seed: int) -> Values:
        """The KV cache that a prefill of `shape.past` tokens leaves, or an empty one."""
        if not self._past:
            return {}
        if shape.past == 0:
            return {n: buffers.blank(n, ELEMENT[self._inputs[n].type], self._dims(n, shape, 0)) for n in self._past}
        keys = {n: (n, ELEMENT[self._inputs[n].type], shape) for n in self._past}
        if not buffers.values.keys() >= set(keys.values()):
            prompt = Shape(shape.batch, 0, shape.past)
            inputs = self._others(prompt, buffers, seed) | self._cache(prompt, buffers, seed)
            filled = self._run_unbound(inputs, {})
            for name in self._past:
                buffers.values.setdefault(keys[name], filled[self._signature.cache[name]])
        return {name: buffers.values[key] for name, key in keys.items()}

    def _one_cache(self, shape: Shape, buffers: Buffers, seed: int, *, trial: bool = False) -> Values:
        """A cache with room for `shape.tokens` more, filled by a prefill of `shape.past` tokens in place."""
        cache = {
            n: buffers.blank(f"{n} in place", ELEMENT[self._inputs[n].type], self._dims(n, shape, shape.total))
            for n in self._past
        }
        filling = (shape, seed, *self._past)
        if shape.past and filling not in buffers.filled:  # by another arm, whose numbers do as well
            inputs = self._others(Shape(shape.batch, 0, shape.past), buffers, seed) | cache
            self._run_unbound(inputs, {self._signature.cache[n]: v for n, v in cache.items()}, trial=trial)
            buffers.filled.add(filling)
        return cache

    def _dims(self, name: str, shape: Shape, length: int) -> tuple[int, ...]:
        return self._signature.cache_shape(name, shape.batch, length)

    def _run_options(self, graph_id: int, trial: bool = False) -> Any:
        import onnxruntime as ort

        options = ort.RunOptions()
        if trial:
            options.log_severity_level = _SAY_NOTHING
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options


class _Adapter:
    """The tensors of an .onnx_adapter file. ONNX Runtime's own LoraAdapter makes inputs of them at each run, but
    not where inputs are bound, so they are bound like any other."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        self._file = ort.AdapterFormat.read_adapter(str(path))  # owns the memory
        self.values: Values = self._file.get_parameters()


def _timed(session: "InferenceSession", binding: "IOBinding", options: Any) -> Callable[[], float]:
    # Bound methods looked up once: attribute access would be part of every sample.
    run, synchronize, now = session.run_with_iobinding, binding.synchronize_outputs, time.perf_counter_ns

    def call() -> float:
        start = now()
        run(binding, options)
        synchronize()
        return (now() - start) / 1e6

    return call


def delayed(run: Callable[[], float], share: float) -> Callable[[], float]:
    """The same call, made longer by this share of itself: a control where there is no slower graph."""
    now = time.perf_counter_ns

    def call() -> float:
        start = now()
        run()
        end = start + (now() - start) * (1 + share)
        while now() < end:
            pass
        return (now() - start) / 1e6

    return call


def misplaced(model: Path, provider: str, threads: int, shape: Shape, adapter: Path | None) -> tuple[str, ...]:
    """Heavy nodes that ran elsewhere than on the provider in one profiled run, in a session of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arm = ArmSession(model, provider, threads, adapter=adapter, profile=Path(folder, "profile"))
        arm.call(shape, Buffers(arm.device)).run()
        events = profile_events(Path(arm.session.end_profiling()))
    return strays(events, runtime.PROVIDERS[provider])
