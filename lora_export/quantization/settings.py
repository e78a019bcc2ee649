"""Where a model's folder says how it was quantized, and what type it computes in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_export.contracts import TensorSource
from lora_export.quantization.stored import FLOATS_OF_TORCH
from lora_export.storage.documents import decode
from lora_export.storage.sealed import read_json

T = TypeVar("T")

KEY = "quantization_config"
KEY_OF_MLX = "quantization"
MODELOPT = "hf_quant_config.json"  # of NVIDIA's Model Optimizer, beside config.json or instead of its key


@dataclass(frozen=True)
class _ModelOptFile:
    quantization: Mapping[str, Any]


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a configuration, or of a part of it such as text_config; MLX calls it
    `quantization`. None without one."""
    return _of_mlx(config) or next((settings for _, settings in _parts(config) if settings), None)


def decoded_settings(config: Mapping[str, Any], type_: type[T]) -> T:
    """The settings of a configuration as a dataclass. InputError for a value of another type."""
    return decode(settings_of(config) or {}, type_, KEY, "config.json")


def places_of(config: Mapping[str, Any]) -> frozenset[str]:
    """Where the configuration has a quantization_config: the keys on the way to it, joined by dots."""
    places = {KEY_OF_MLX} if _of_mlx(config) else set()
    places |= {KEY} if KEY in config else set()  # which may be null
    return frozenset(places | {place for place, _ in _parts(config)})


def with_settings(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same configuration; with the settings of hf_quant_config.json where it has none of its own."""
    path = folder / MODELOPT
    if settings_of(config) or not path.is_file():
        return config
    document = decode(read_json(path), _ModelOptFile, MODELOPT, path)
    return {**config, KEY: {**document.quantization, "quant_method": "modelopt"}}


def dtype_of(source: TensorSource, config: Mapping[str, Any]) -> str:
    """The type that the model computes in, as safetensors spells it: the one that the configuration or a part of it
    names, else the one that most bytes of its unquantized weights have."""
    parts = (config, *(v for v in config.values() if isinstance(v, dict)))
    for name in (p.get("dtype") or p.get("torch_dtype") for p in parts):
        if isinstance(name, str) and name in FLOATS_OF_TORCH:
            return FLOATS_OF_TORCH[name]
    sizes = dict.fromkeys(("F16", "BF16"), 0)
    for info in source.tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _of_mlx(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    own = config.get(KEY_OF_MLX)
    method = (config.get(KEY) or {}).get("quant_method")
    return own if isinstance(own, dict) and method is None and {"group_size", "bits"} <= own.keys() else None


def _parts(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(config.get(KEY), dict):
        yield f"{place}{KEY}", config[KEY]
    for key, value in config.items():
        if isinstance(value, dict) and key != KEY:
            yield from _parts(value, f"{place}{key}.")
