"""Sessions whose every input and output is bound to a buffer, and the calls that are timed."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export import runtime
from lora_export.benchmark.placement import profile_events, strays
from lora_export.contracts import Phase
from lora_export.errors import InputError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue

_ELEMENT = {
    "tensor(float)": 1,
    "tensor(int32)": 6,
    "tensor(int64)": 7,
    "tensor(float16)": 10,
    "tensor(bfloat16)": 16,
}
_INTEGERS = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
# Without this, the idle threads of one arm spin on the cores that the next arm is timed on.
_STOP_SPINNING = "1"
_NO_CAPTURE = -1
_TOKENS = ("input_ids", "attention_mask", "encoder_attention_mask", "position_ids", "token_type_ids")
_IDS = 64  # no vocabulary is smaller, and which token it is makes no difference to the time
_SAMPLES = 320  # of a wave at 16 kHz, for each position of wav2vec 2


@dataclass(frozen=True)
class Shape:
    """What one call computes: `tokens` new tokens after `past` cached ones, for each of `batch` sequences."""

    batch: int
    past: int
    tokens: int

    @staticmethod
    def of(phase: Phase, batch: int, prompt: int) -> "Shape":
        return Shape(batch, prompt, 1) if phase == "decode" else Shape(batch, 0, prompt)


@dataclass
class Buffers:
    """The buffers of one cell, shared by all arms whose inputs and outputs look the same.

    One set for all: no arm profits from a luckier address, and a long prefill's logits exist once.
    """

    device: str
    _values: dict[tuple[Any, ...], "OrtValue"] = field(default_factory=dict)

    def get(self, key: tuple[Any, ...]) -> "OrtValue":
        return self._values[key]

    def put(self, key: tuple[Any, ...], value: "OrtValue") -> "OrtValue":
        return self._values.setdefault(key, value)

    def has(self, key: tuple[Any, ...]) -> bool:
        return key in self._values

    def array(self, name: str, shape: Shape, value: "np.ndarray[Any, Any]") -> "OrtValue":
        import onnxruntime as ort

        key = (name, str(value.dtype), shape)
        if not self.has(key):
            self.put(key, ort.OrtValue.ortvalue_from_numpy(value, self.device, 0))
        return self.get(key)

    def blank(self, name: str, element: int, dims: tuple[int, ...]) -> "OrtValue":
        import onnxruntime as ort

        key = (name, element, dims)
        if not self.has(key):
            make = ort.OrtValue.ortvalue_from_shape_and_type
            self.put(key, make(list(dims), element, self.device, 0))
        return self.get(key)


class Engine:
    """A session opened for measuring. `provider` is cpu, cuda or tensorrt."""

    def __init__(
        self,
        model: Path,
        provider: str,
        threads: int,
        *,
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
        self._inputs = {i.name: i for i in self.session.get_inputs()}
        past = [name for name in self._inputs if name.startswith("past")]
        # The decoder of an encoder-decoder cannot fill its own caches: they are inputs like any other.
        alone = not any("encoder" in name or "cross" in name for name in self._inputs)
        self._past = past if alone else []
        self._signature = runtime.DecoderSignature.of(self.session) if self._past else None
        self._refuse_unknown_types(model)

    @property
    def is_decoder(self) -> bool:
        """Whether one graph does both a prompt and a step."""
        return bool(self._past)

    def call(self, shape: Shape, buffers: Buffers, graph_id: int = 1, seed: int = 0) -> Callable[[], float]:
        """A function that runs `shape` once on fixed buffers; milliseconds until the device is done.

        One run beforehand, uncaptured, finds the output shapes. Each shape of a session with CUDA graphs
        needs a `graph_id` of its own.
        """
        inputs = self._token_inputs(shape, buffers, seed) | self._cache(shape, buffers, seed)
        binding = self._run_unbound(inputs)
        for meta, found in zip(self.session.get_outputs(), list(binding.get_outputs()), strict=True):
            # Only what is still unknown is copied: dims and element type, not the device's memory.
            dims, element = tuple(found.shape()), found.element_type()
            binding.bind_ortvalue_output(meta.name, buffers.blank(meta.name, element, dims))
        return _timed(self.session, binding, self._run_options(graph_id))

    def _run_unbound(self, inputs: dict[str, "OrtValue"]) -> "IOBinding":
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            binding.bind_output(output.name, self.device, 0)
        self.session.run_with_iobinding(binding, self._run_options(_NO_CAPTURE))
        binding.synchronize_outputs()
        return binding

    def _token_inputs(self, shape: Shape, buffers: Buffers, seed: int) -> dict[str, "OrtValue"]:
        names = [name for name in self._inputs if name not in self._past]
        return {name: buffers.array(name, shape, self._values(name, shape, seed)) for name in names}

    def _values(self, name: str, shape: Shape, seed: int) -> "np.ndarray[Any, Any]":
        if self._inputs[name].type not in _INTEGERS:
            return self._signal(name, shape, seed)
        dtype = _INTEGERS[self._inputs[name].type]
        if name == "encoder_attention_mask":
            return np.ones((shape.batch, shape.past), dtype)
        if "mask" in name:
            return np.ones((shape.batch, shape.past + shape.tokens), dtype)
        if name == "position_ids":
            row = np.arange(shape.past, shape.past + shape.tokens, dtype=dtype)
            return np.tile(row, (shape.batch, 1))
        if name == "token_type_ids":
            return np.zeros((shape.batch, shape.tokens), dtype)
        return np.random.default_rng(seed).integers(0, _IDS, (shape.batch, shape.tokens)).astype(dtype)

    def _signal(self, name: str, shape: Shape, seed: int) -> "np.ndarray[Any, Any]":
        """Seeded numbers for images, sounds, states of an encoder and caches. A sequence is as long as the prompt,
        a wave as long as the sound of so many tokens."""
        given = self._inputs[name]
        dims = [d if isinstance(d, int) else _length(d, shape) for d in given.shape]
        if name == "input_values":
            dims[-1] *= _SAMPLES
        values = np.random.default_rng(seed).standard_normal([shape.batch, *dims[1:]], np.float32)
        return values.astype(runtime.numpy_dtype(given.type))

    def _cache(self, shape: Shape, buffers: Buffers, seed: int) -> dict[str, "OrtValue"]:
        """The KV cache that a prefill of `shape.past` tokens leaves, or an empty one."""
        if self._signature is None:
            return {}
        pairs = zip(self._signature.past, self._signature.present, strict=True)
        names = {name: other for past, present in pairs for name, other in zip(past, present, strict=True)}
        if shape.past == 0:
            dims = (shape.batch, self._signature.kv_heads, 0, self._signature.head_dim)
            return {n: buffers.blank(n, _ELEMENT[self._inputs[n].type], dims) for n in names}
        keys = {n: (n, _ELEMENT[self._inputs[n].type], shape) for n in names}
        if not all(buffers.has(key) for key in keys.values()):
            filled = self._prefill(Shape(shape.batch, 0, shape.past), buffers, seed)
            for name, present in names.items():
                buffers.put(keys[name], filled[present])
        return {name: buffers.get(key) for name, key in keys.items()}

    def _prefill(self, shape: Shape, buffers: Buffers, seed: int) -> dict[str, "OrtValue"]:
        inputs = self._token_inputs(shape, buffers, seed) | self._cache(shape, buffers, seed)
        binding = self._run_unbound(inputs)
        outputs = [o.name for o in self.session.get_outputs()]
        return dict(zip(outputs, binding.get_outputs(), strict=True))

    def _run_options(self, graph_id: int) -> Any:
        import onnxruntime as ort

        if not self.cuda_graph:
            return None
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def _refuse_unknown_types(self, model: Path) -> None:
        odd = [
            f"{n} ({i.type})"
            for n, i in self._inputs.items()
            if i.type not in _ELEMENT or (i.type in _INTEGERS and n not in _TOKENS)
        ]
        if odd:
            raise InputError(
                f"inputs that the benchmark does not know: {', '.join(odd)}",
                where=model,
                expected=f"{', '.join(_TOKENS)}, caches, and images or sounds as floating-point numbers",
            )


def _length(name: str | None, shape: Shape) -> int:
    """Of a dimension with this name: past tokens and those of an encoder make up the prompt of a step."""
    return shape.past if name and ("past" in name or "encoder" in name) else shape.tokens


def _timed(session: "InferenceSession", binding: "IOBinding", options: Any) -> Callable[[], float]:
    # Bound methods looked up once: attribute access would be part of every sample.
    run, synchronize, now = session.run_with_iobinding, binding.synchronize_outputs, time.perf_counter_ns

    def call() -> float:
        start = now()
        run(binding, options)
        synchronize()
        return (now() - start) / 1e6

    return call


def misplaced(model: Path, provider: str, threads: int, shape: Shape) -> tuple[str, ...]:
    """Heavy nodes that ran elsewhere than on the provider in one profiled run, in a session of its own."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(model, provider, threads, profile=Path(folder, "profile"))
        engine.call(shape, Buffers(engine.device))()
        events = profile_events(Path(engine.session.end_profiling()))
    return strays(events, runtime.PROVIDERS[provider])
