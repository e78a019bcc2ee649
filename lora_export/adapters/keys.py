"""Tensors of an adapter by module and marker."""

from collections.abc import Mapping

from lora_export.contracts import TensorInfo


def base_name(name: str) -> str:
    """The base's name of a tensor that PEFT saved whole: its wrappers removed."""
    for wrapper in (".modules_to_save", ".token_adapter", ".base_layer", ".original_module"):
        name = name.replace(wrapper, "")
    return name


def part(name: str, marker: str) -> str | None:
    """The module of `module.<marker>` or `module.<marker>.weight`."""
    for ending in (f".{marker}.weight", f".{marker}"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return None


def group(tensors: Mapping[str, TensorInfo], markers: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """module → {marker: key} for all tensors that carry one of the markers."""
    modules: dict[str, dict[str, str]] = {}
    for key in tensors:
        for marker in markers:
            module = part(key, marker)
            if module is not None:
                modules.setdefault(module, {})[marker] = key
    return modules
