"""The export engines, and the one of them that exports an architecture."""

from collections.abc import Iterator, Mapping
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
    return next(fitting(config, engine))


def fitting(config: Mapping[str, Any], engine: str | None = None) -> Iterator[Engine]:
    """The engines for a model's config.json, best first: at least one, and only `engine` where that is given.

    An engine is asked when it is its turn: the generic one has to import transformers. Raises what `choose` does.
    """
    known = engines()
    if engine is not None and engine not in known:
        raise ExportError(f"unknown engine {engine!r}", expected=", ".join(known))
    fits = False
    for each in [known[engine]] if engine else known.values():
        if each.exports(config):
            fits = True
            yield each
    if not fits:
        raise _refusal(config, engine)


def _refusal(config: Mapping[str, Any], engine: str | None) -> ExportError:
    architecture = architecture_of(config)
    others = [name for name, e in engines().items() if name != engine and e.exports(config)]
    if engine is not None and others:
        return ExportError(
            f"the engine {engine} does not export {architecture}",
            expected=f"--engine {' or '.join(others)}, or no --engine",
        )
    return ExportError(
        f"no engine exports the architecture {architecture} (model_type {config.get('model_type')!r})",
        where="config.json",
        expected="a class of transformers that its auto classes have a task for, such as LlamaForCausalLM",
        next_step="use the merged folder with transformers, vLLM or TGI as it is: lora-export merge",
    )
