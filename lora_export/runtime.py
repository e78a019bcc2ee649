"""What ONNX Runtime can actually do on this machine: providers are tried, and sessions verified.

Provider names are the short ones of the command line: cpu, cuda, tensorrt.
"""

import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lora_export.choices import Provider
from lora_export.errors import InputError, RuntimeUnavailable

if TYPE_CHECKING:
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
    """The short name of a provider that has run a node on this machine: `auto` is cuda if it works, else cpu.

    Raises RuntimeUnavailable, with ONNX Runtime's own reason, if the requested provider does not work.
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
    """Why a provider does not work on this machine, or None if it has run a MatMul.

    Tried in a separate process: a broken driver may print, hang or crash, and ONNX Runtime names a missing library
    only on stderr.
    """
    command = [sys.executable, "-c", _PROBE, PROVIDERS[provider]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"a 2×2 MatMul did not finish within {PROBE_SECONDS} s"
    if done.returncode == 0:
        return None
    return _reason(done.stderr) or f"the probe ended with status {done.returncode}"


# The session's own error only says that fallback is off; the log names the missing library.
_PROBE = """
import sys
import numpy, onnx.parser, onnxruntime as ort
if sys.argv[1] not in ort.get_available_providers():
    sys.exit("REASON " + sys.argv[1] + " is not compiled into this onnxruntime")
if sys.argv[1] != "CPUExecutionProvider" and hasattr(ort, "preload_dlls"):
    ort.preload_dlls()
text = "probe (float[2, 2] a, float[2, 2] b) => (float[2, 2] c) { c = MatMul(a, b) }"
model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> ' + text).SerializeToString()
options = ort.SessionOptions()
if sys.argv[1] != "CPUExecutionProvider":
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
try:
    session = ort.InferenceSession(model, options, providers=[sys.argv[1]], enable_fallback=0)
    one = numpy.ones((2, 2), numpy.float32)
    assert (session.run(None, {"a": one, "b": one})[0] == 2).all()
except Exception as error:
    sys.exit("REASON " + " ".join(str(error).split()))
if session.get_providers()[0] != sys.argv[1]:
    sys.exit("REASON the session fell back to " + session.get_providers()[0])
"""


def _reason(stderr: str) -> str:
    """The most informative line of ONNX Runtime's stderr: the library it could not load, else its last error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for line in lines:
        if "with error: " in line:
            return line.split("with error: ", 1)[1].strip()
    for line in lines:
        if "Failed to create" in line or "CUDA failure" in line:
            return line.split("] ", 1)[-1].removesuffix("\x1b[m")
    reasons = [line.removeprefix("REASON ") for line in lines if line.startswith("REASON ")]
    return reasons[-1] if reasons else (lines[-1] if lines else "")


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
    """A session in which `provider` (cpu, cuda or tensorrt) really is the first; anything else raises.

    Shape arithmetic may still run on the CPU: for CUDA, ONNX Runtime decides that. A model from elsewhere must have
    passed `onnx_export.check_model` first.
    """
    import onnxruntime as ort

    name = PROVIDERS[provider]
    if provider != "cpu":
        _preload_libraries()
    try:
        session = ort.InferenceSession(
            str(model),
            options or session_options(),
            providers=[(name, dict(provider_options or {}))],
            enable_fallback=0,  # a provider that fails in a run would be replaced by the CPU
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
    """Load CUDA from the nvidia-* wheels, which are not on a library path. It prints what it does not find."""
    import contextlib
    import io

    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
