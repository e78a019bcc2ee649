"""What ONNX Runtime can really do here: providers tried out, sessions verified, decoder signatures read.

Provider names are the short ones of the command line: cpu, cuda, tensorrt.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lora_export.choices import Provider
from lora_export.errors import InputError, RuntimeUnavailable

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
PROBE_SECONDS = 120  # a first TensorRT engine takes tens of seconds; a missing library shows within one
_ERRORS_ONLY = 3
_FIX = {
    "cuda": "install the NVIDIA driver and the CUDA and cuDNN that onnxruntime names above "
    "(https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html), or use --provider cpu",
    "tensorrt": "install TensorRT "
    "(https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html), "
    "or use --provider cuda",
    "cpu": "reinstall onnxruntime: its CPU provider always works",
}


# --- providers ---------------------------------------------------------------------------------------------


def resolve_provider(name: str) -> Provider:
    """The short name of a provider that has run a node here: `auto` is cuda where it works, else cpu.

    Raises RuntimeUnavailable, with ONNX Runtime's own reason, if the provider asked for does not work.
    """
    if name == "auto":
        return "cpu" if why_not("cuda") else "cuda"
    known: Provider | None = next((p for p in get_args(Provider) if p == name), None)
    if known is None:
        raise InputError(f"unknown provider {name!r}", expected="auto, " + ", ".join(PROVIDERS))
    reason = why_not(known)
    if reason:
        raise RuntimeUnavailable(
            f"the {name} execution provider does not work here: {reason}",
            expected=f"{PROVIDERS[known]} to run a model",
            next_step=_FIX[name],
        )
    return known


@functools.cache
def why_not(provider: str) -> str | None:
    """Why a provider does not work here, or None where it has run a MatMul.

    Tried in a process of its own: a broken driver may print, hang or crash, and ONNX Runtime says which
    library is missing on stderr alone.
    """
    command = [sys.executable, "-c", _PROBE, PROVIDERS[provider]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"a 2×2 MatMul did not finish within {PROBE_SECONDS} s"
    if done.returncode == 0:
        return None
    return _reason(done.stderr) or f"the probe ended with status {done.returncode}"


# The session's own error only says that fallback is off; the library that is missing stands in the log.
_PROBE = """
import sys
import numpy, onnx.helper as h, onnxruntime as ort
if sys.argv[1] not in ort.get_available_providers():
    sys.exit("REASON " + sys.argv[1] + " is not compiled into this onnxruntime")
if sys.argv[1] != "CPUExecutionProvider" and hasattr(ort, "preload_dlls"):
    ort.preload_dlls()
io = [h.make_tensor_value_info(n, 1, [2, 2]) for n in "abc"]
graph = h.make_graph([h.make_node("MatMul", ["a", "b"], ["c"])], "probe", io[:2], io[2:])
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString()
options = ort.SessionOptions()
if sys.argv[1] != "CPUExecutionProvider":
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
try:
    session = ort.InferenceSession(model, options, providers=[sys.argv[1]])
    one = numpy.ones((2, 2), numpy.float32)
    assert (session.run(None, {"a": one, "b": one})[0] == 2).all()
except Exception as error:
    sys.exit("REASON " + " ".join(str(error).split()))
if session.get_providers()[0] != sys.argv[1]:
    sys.exit("REASON the session fell back to " + session.get_providers()[0])
"""


def _reason(stderr: str) -> str:
    """The most telling line of ONNX Runtime's stderr: the library it could not load, else its last error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for line in lines:
        if "with error: " in line:
            return line.split("with error: ", 1)[1].strip()
    for line in lines:
        if "Failed to create" in line or "CUDA failure" in line:
            return line.split("] ", 1)[-1].removesuffix("\x1b[m")
    told = [line.removeprefix("REASON ") for line in lines if line.startswith("REASON ")]
    return told[-1] if told else (lines[-1] if lines else "")


def providers_report() -> list[dict[str, Any]]:
    """For each provider: `provider`, `compiled_in`, `works`, and the `reason` where it does not."""
    import onnxruntime as ort

    compiled = ort.get_available_providers()
    return [
        {"provider": short, "compiled_in": name in compiled, "works": not reason, "reason": reason}
        for short, name in PROVIDERS.items()
        for reason in [why_not(short)]
    ]


# --- sessions ----------------------------------------------------------------------------------------------


def session_options() -> "onnxruntime.SessionOptions":
    """Options that keep ONNX Runtime's warnings off stderr; everything else at its default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    return options


def open_session(
    model: Path,
    provider: str,
    *,
    options: "onnxruntime.SessionOptions | None" = None,
    provider_options: Mapping[str, str] | None = None,
) -> "onnxruntime.InferenceSession":
    """A session that really has `provider` (cpu, cuda or tensorrt) first; anything else raises.

    Shape arithmetic may still run on the CPU: for CUDA that is ONNX Runtime's own choice. A model from
    elsewhere must have passed `onnx_export.check_model` before it comes here.
    """
    import onnxruntime as ort

    name = PROVIDERS[provider]
    if provider != "cpu":
        _preload_libraries()
    try:
        session = ort.InferenceSession(
            str(model), options or session_options(), providers=[(name, dict(provider_options or {}))]
        )
    except Exception as error:  # ONNX Runtime's exception classes share no base but this one
        raise RuntimeUnavailable(
            f"ONNX Runtime cannot open the model on {provider}: {' '.join(str(error).split())}",
            where=model,
            expected=f"a model that loads with {name}",
        ) from error
    if session.get_providers()[0] != name:
        raise RuntimeUnavailable(
            f"ONNX Runtime fell back to {session.get_providers()[0]}",
            where=model,
            expected=name,
            next_step="run lora-export env to see which providers work, and why others do not",
        )
    return session


@functools.cache
def _preload_libraries() -> None:
    """Load CUDA from the nvidia-* wheels, which are on no library path. It prints what it does not find."""
    import contextlib
    import io

    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


# --- decoder signatures ------------------------------------------------------------------------------------


def numpy_dtype(onnx_type: str) -> "np.dtype[Any]":
    """The numpy type of `tensor(float16)` and its like; bfloat16 is ml_dtypes' own."""
    import ml_dtypes
    import numpy as np

    element = onnx_type.removeprefix("tensor(").removesuffix(")")
    if element == "bfloat16":
        brain: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return brain
    plain = {"float": "float32", "double": "float64"}.get(element, element)
    return np.dtype(plain)


def to_numpy(value: "onnxruntime.OrtValue", dtype: "np.dtype[Any]") -> "np.ndarray[Any, Any]":
    """The numbers of an OrtValue on the CPU, in a copy. dtype: numpy_dtype of its type; OrtValue.numpy() does not
    know bfloat16."""
    import ctypes

    import numpy as np

    size = value.tensor_size_in_bytes()
    raw = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return np.frombuffer(raw, dtype).reshape(value.shape()).copy()


@dataclass(frozen=True)
class DecoderSignature:
    """What goes into and comes out of a decoder with a KV cache.

    past and present: a (key, value) pair of names for each layer that has a cache; each tensor is
    [batch, kv_heads, length, head_dim] of cache_dtype. logits: [batch, length, vocabulary] of logits_dtype.
    """

    input_ids: str
    attention_mask: str | None
    position_ids: str | None
    past: tuple[tuple[str, str], ...]
    present: tuple[tuple[str, str], ...]
    logits: str
    kv_heads: int
    head_dim: int
    ids_dtype: "np.dtype[Any]"
    cache_dtype: "np.dtype[Any]"
    logits_dtype: "np.dtype[Any]"

    @classmethod
    def of(cls, session: "onnxruntime.InferenceSession") -> "DecoderSignature":
        """Read it from a session; InputError if that is no decoder with a KV cache."""
        inputs = {node.name: node for node in session.get_inputs()}
        outputs = {node.name: node for node in session.get_outputs()}
        past = _cache_pairs(list(inputs), "past")
        present = _cache_pairs(list(outputs), "present")
        if "input_ids" not in inputs or "logits" not in outputs or not past or len(past) != len(present):
            raise InputError(
                "the model is no decoder with a KV cache",
                expected="input_ids, past_key_values.N.key and .value, logits, present.N.key and .value",
            )
        key = inputs[past[0][0]]
        return cls(
            input_ids="input_ids",
            attention_mask="attention_mask" if "attention_mask" in inputs else None,
            position_ids="position_ids" if "position_ids" in inputs else None,
            past=past,
            present=present,
            logits="logits",
            kv_heads=_dimension(key.shape[1], "num_key_value_heads", session),
            head_dim=_dimension(key.shape[3], "head_size", session),
            ids_dtype=numpy_dtype(inputs["input_ids"].type),
            cache_dtype=numpy_dtype(key.type),
            logits_dtype=numpy_dtype(outputs["logits"].type),
        )


def _cache_pairs(names: list[str], prefix: str) -> tuple[tuple[str, str], ...]:
    keys = {name.removesuffix(".key") for name in names if name.startswith(prefix) and name.endswith(".key")}
    layers = sorted(
        (stem for stem in keys if f"{stem}.value" in names), key=lambda stem: int(stem.rsplit(".", 1)[1])
    )
    return tuple((f"{stem}.key", f"{stem}.value") for stem in layers)


def _dimension(size: int | str | None, key: str, session: "onnxruntime.InferenceSession") -> int:
    """A dimension of the cache; graphs straight from the builder name it only, genai_config.json has it."""
    if isinstance(size, int):
        return size
    path = getattr(session, "_model_path", None)
    config = Path(path).with_name("genai_config.json") if path else None
    if config is None or not config.is_file():
        raise InputError(f"the cache has the symbolic size {size!r}", where=path, expected="a number")
    return int(json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"][key])
