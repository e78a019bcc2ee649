"""The export engines, and the one of them that an architecture belongs to."""

from collections.abc import Mapping
from typing import Any

from lora_export.errors import ExportError
from lora_export.onnx_export.engines.dynamo import DynamoEngine
from lora_export.onnx_export.engines.genai import GenaiEngine
from lora_export.onnx_export.engines.protocol import Engine, architecture_of

ENGINES: tuple[Engine, ...] = (GenaiEngine(), DynamoEngine())


def choose(config: Mapping[str, Any], engine: str | None = None) -> Engine:
    """The engine for a model's config.json. `engine` names the one wanted, which must fit the model.

    Raises ExportError for an unknown engine or architecture.
    """
    if engine is not None and engine not in {e.name for e in ENGINES}:
        raise ExportError(f"unknown engine {engine!r}", expected=", ".join(e.name for e in ENGINES))
    architecture = architecture_of(config)
    matches = [e for e in ENGINES if architecture in e.architectures]
    if not matches:
        raise ExportError(
            f"no engine exports the architecture {architecture} (model_type {config.get('model_type')!r})",
            where="config.json",
            expected="; ".join(f"{e.name}: {', '.join(sorted(e.architectures))}" for e in ENGINES),
            next_step="use the merged folder with transformers, vLLM or TGI as it is: lora-export merge",
        )
    (found,) = matches
    if engine is not None and engine != found.name:
        raise ExportError(
            f"the engine {engine} does not export {architecture}",
            expected=f"--engine {found.name}, or no --engine",
        )
    return found
