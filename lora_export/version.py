"""The version of this package, for `--version` and for what a run records, and those of other packages."""

import contextlib
from collections.abc import Iterable

__version__ = "0.2.0"
# What writes the bytes of results, or says whether they pass.
LIBRARIES = (
    "torch", "transformers", "peft", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-genai", "onnxruntime-genai-cuda", "optimum", "diffusers", "bitsandbytes", "safetensors",
)  # fmt: skip


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Package → version, for those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
