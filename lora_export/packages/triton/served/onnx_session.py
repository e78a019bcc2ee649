"""A session of ONNX Runtime where Triton wants an instance of a model, for the model.py beside this file."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as triton

_CUDA = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "EXHAUSTIVE"}


def opened(args: dict[str, str], home: Path) -> "onnxruntime.InferenceSession":
    """The graph of the version in the folder `home`. args: what Triton gives to `initialize`.

    TritonModelException if the graph or its processor is not there: nothing runs on the CPU that was meant for a
    GPU.
    """
    path = home / args["model_version"] / "model.onnx" / "model.onnx"
    if not path.is_file():
        raise triton.TritonModelException(f"{path} is missing: keep the models of the repository side by side")
    providers: list[Any] = ["CPUExecutionProvider"]
    if args["model_instance_kind"] == "GPU":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise triton.TritonModelException(
                "the onnxruntime of this Python has no CUDA provider: pip install onnxruntime-gpu, or set "
                "KIND_CPU in config.pbtxt"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"], **_CUDA}))
    session = onnxruntime.InferenceSession(path, providers=providers)
    if args["model_instance_kind"] == "GPU" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise triton.TritonModelException("CUDA does not start: see the warnings of onnxruntime above")
    return session


def parameter(args: dict[str, str], name: str) -> str:
    """Of config.pbtxt; '' if it is not set."""
    found = json.loads(args["model_config"]).get("parameters", {}).get(name, {})
    return str(found.get("string_value", ""))
