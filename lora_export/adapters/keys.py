"""The names that trainers give adapter tensors, brought to one spelling, and the one way to read them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

_PREFIXES = ("base_model.model.", "base_model.")


def strip_prefix(key: str) -> str:
    """base_model.model.model.layers.0… → model.layers.0…; a name without PEFT's prefix stays as it is."""
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def base_name(key: str) -> str:
    """The base's name of a tensor that PEFT saved whole: its wrappers removed."""
    name = strip_prefix(key)
    for wrapper in (".modules_to_save.default", ".modules_to_save", ".base_layer", ".original_module"):
        name = name.replace(wrapper, "")
    return name


def part(key: str, marker: str) -> str | None:
    """The module of `module.<marker>` or `module.<marker>.weight`, with or without PEFT's `.default`."""
    name = strip_prefix(key).replace(".default", "")
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


def read_finite(source: TensorSource, key: str) -> "torch.Tensor":
    """An adapter tensor in fp32; NaN or infinity would spread to the whole weight, so it is refused."""
    import torch

    value = source.read(key).to(torch.float32)
    if not bool(torch.isfinite(value).all()):
        raise AdapterError(
            "the adapter holds NaN or infinity",
            where=source.tensors[key].file,
            tensor=key,
            expected="finite numbers",
            next_step="take an earlier checkpoint of the training: this one diverged",
        )
    return value
