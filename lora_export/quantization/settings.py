"""Where a model's folder says how it was quantized, and what type it computes in."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.contracts import TensorSource
from lora_export.quantization import mlx
from lora_export.storage.documents import Kind, check
from lora_export.storage.sealed import read_json

KEY = "quantization_config"
MODELOPT = "hf_quant_config.json"  # of NVIDIA's Model Optimizer, beside config.json or in place of its key
_MODELOPT: Kind = {"quantization": dict}
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a configuration, or of a part of it such as text_config; MLX calls it
    `quantization`. None without one."""
    return mlx.settings_of(config) or next((found for _, found in _parts(config) if found), None)


def places_of(config: Mapping[str, Any]) -> frozenset[str]:
    """Where the configuration has a quantization_config: the keys on the way to it, joined by dots."""
    found = {"quantization"} if mlx.settings_of(config) else set()
    found |= {KEY} if KEY in config else set()  # which may be null
    return frozenset(found | {place for place, _ in _parts(config)})


def with_settings(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same configuration; with the settings of hf_quant_config.json where it has none of its own."""
    path = folder / MODELOPT
    if settings_of(config) or not path.is_file():
        return config
    document = read_json(path)
    check(document, _MODELOPT, MODELOPT, path)
    return {**config, KEY: {**document["quantization"], "quant_method": "modelopt"}}


def dtype_of(source: TensorSource, config: Mapping[str, Any]) -> str:
    """What the model computes in, as safetensors spells it: as it says, or a part of it says, or as most of its
    unquantized weights are stored."""
    parts = (config, *(v for v in config.values() if isinstance(v, dict)))
    said = (p.get("dtype") or p.get("torch_dtype") for p in parts)
    found = next((_TYPES[s] for s in said if isinstance(s, str) and s in _TYPES), None)
    if found is not None:
        return found
    sizes = dict.fromkeys(("F16", "BF16"), 0)
    for info in source.tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _parts(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(config.get(KEY), dict):
        yield f"{place}{KEY}", config[KEY]
    for key, value in config.items():
        if isinstance(value, dict) and key != KEY:
            yield from _parts(value, f"{place}{key}.")
