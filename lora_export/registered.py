"""Export engines and package targets by name: those of this package first, then those of plug-ins.

Both are objects of a class that `onnx_export.engines.Engine` or `packages.Target` is the base of. They are known
here by the text that an entry point would have, so that the command line lists their names and imports none.
"""

import functools
from typing import Any, ClassVar, Protocol, TypeVar

from lora_export.plugins import plugins


class Named(Protocol):
    name: ClassVar[str]


T = TypeVar("T", bound=Named)

ENGINES, TARGETS = "lora_export.export_engines", "lora_export.package_targets"  # groups of entry points
_BUILT_IN = {
    ENGINES: {
        "genai": "lora_export.onnx_export.engines.genai:ENGINE",
        "dynamo": "lora_export.onnx_export.engines.dynamo:ENGINE",
        "diffusion": "lora_export.onnx_export.engines.diffusion:ENGINE",
    },
    TARGETS: {
        "genai": "lora_export.packages.targets.genai:TARGET",
        "optimum": "lora_export.packages.targets.optimum:TARGET",
        "triton": "lora_export.packages.targets.triton:TARGET",
        "transformers-js": "lora_export.packages.targets.transformers_js:TARGET",
        "hf": "lora_export.packages.targets.hf:TARGET",
        "mlflow": "lora_export.packages.targets.mlflow:TARGET",
        "gguf": "lora_export.packages.targets.gguf:TARGET",
    },
}


def engine_names() -> tuple[str, ...]:
    """What --engine takes."""
    return _names(ENGINES)


def target_names() -> tuple[str, ...]:
    """What `package --for` takes."""
    return _names(TARGETS)


def _names(group: str) -> tuple[str, ...]:
    from importlib.metadata import entry_points

    return (*_BUILT_IN[group], *sorted({e.name for e in entry_points(group=group)} - {*_BUILT_IN[group]}))


def registered(group: str, base: type[T]) -> dict[str, T]:
    """Name → object, each of the class `base`. InputError, naming the package, for a plug-in that is not."""
    objects: dict[str, T] = dict(_built_in(group))
    for plugin in plugins(group):
        if not isinstance(plugin.value, base):
            raise plugin.refuse(f"is {type(plugin.value).__name__}", f"an object of a subclass of {base.__name__}")
        if plugin.name in objects or plugin.value.name != plugin.name:
            taken = ", ".join(objects)
            raise plugin.refuse(f"is called {plugin.value.name!r}", f"the name of its entry point, and not {taken}")
        objects[plugin.name] = plugin.value
    return objects


@functools.cache
def _built_in(group: str) -> dict[str, Any]:
    from importlib.metadata import EntryPoint

    return {name: EntryPoint(name, value, group).load() for name, value in _BUILT_IN[group].items()}
