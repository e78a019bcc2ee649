"""Which modules an adapter has, by its configuration alone: PEFT's rule for target_modules."""

from collections.abc import Mapping
from typing import Any

from lora_export.adapters.kind import AdapterFile
from lora_export.patterns import fullmatch


def targeted(file: AdapterFile, modules: Mapping[str, Any]) -> list[str]:
    """Those of the modules that target_modules names, in their order. AdapterError for what cannot be told so."""
    config = file.config
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    words = isinstance(targets, list) and all(isinstance(n, str) for n in targets)
    if not (targets and (words or isinstance(targets, str))) or targets == "all-linear":
        raise file.refuse(
            f"target_modules is {targets!r}",
            expected="the names of the layers, or a regular expression, as PEFT saves them: only they say which "
            "layers are adapted",
        )
    if isinstance(layers, int):
        layers = [layers]
    if layers and not (isinstance(layers, list) and all(isinstance(n, int) for n in layers)):
        raise file.refuse(f"layers_to_transform is {layers!r}", expected="a number or a list of numbers")
    saved = [str(m) for m in config.get("modules_to_save") or ()]
    return [
        name
        for name in modules
        if _matches(targets, name) and not _is_saved(saved, name) and (not layers or _layer(file, name) in layers)
    ]


def _matches(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return fullmatch(targets, name) is not None
    return name in targets or name.endswith(tuple(f".{n}" for n in targets))


def _is_saved(saved: list[str], name: str) -> bool:
    return any(fullmatch(rf"(^|.*\.){m}($|\..*)", name) is not None for m in saved)


def _layer(file: AdapterFile, name: str) -> int | None:
    """The first number in the name that stands behind a component, or behind one of layers_pattern."""
    pattern = file.config.get("layers_pattern")
    match = None
    for one in [pattern] if isinstance(pattern, str) else pattern or [None]:
        words = r".*?\.[^.]*\.(?P<index>\d+)\..*" if one is None else rf"(?:|.*?\.){one}\.(?P<index>\d+)\..*"
        match = match or fullmatch(words, name)
    return int(match["index"]) if match else None
