"""The export engines, and the one of them that exports an architecture."""

from collections.abc import Mapping
from typing import Any

from lora_export import registered
from lora_export.errors import ExportError, InputError
from lora_export.onnx_export.engines.protocol import Engine, architecture_of


def engines() -> dict[str, Engine]:
    """Name → engine: the built-in ones, then those of plug-ins."""
    return registered.registered(registered.ENGINES, Engine)  # type: ignore[type-abstract]


def engine_named(name: str) -> Engine:
    """The engine that an export names. InputError where it is not installed."""
    known = engines()
    if name not in known:
        raise InputError(
            f"the export was made by the engine {name!r}, which is not installed",
            expected=", ".join(known),
            next_step="install the package that brings it",
        )
    return known[name]


def choose(config: Mapping[str, Any], engine: str | None = None) -> Engine:
    """The engine for a model's config.json: `engine`, which must fit the model, or the first that does.

    Raises ExportError for an unknown engine or architecture.
    """
    known = engines()
    if engine is not None and engine not in known:
        raise ExportError(f"unknown engine {engine!r}", expected=", ".join(known))
    architecture = architecture_of(config)
    fitting = {name: e for name, e in known.items() if architecture in e.architectures}
    if not fitting:
        raise ExportError(
            f"no engine exports the architecture {architecture} (model_type {config.get('model_type')!r})",
            where="config.json",
            expected="; ".join(f"{name}: {', '.join(sorted(e.architectures))}" for name, e in known.items()),
            next_step="use the merged folder with transformers, vLLM or TGI as it is: lora-export merge",
        )
    if engine is not None and engine not in fitting:
        raise ExportError(
            f"the engine {engine} does not export {architecture}",
            expected=f"--engine {' or '.join(fitting)}, or no --engine",
        )
    return fitting[engine or next(iter(fitting))]
