"""Whether a base is stored quantized, and which of its files and tensors have no place in a merged folder then."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.storage.sealed import read_json

KEY = "quantization_config"
# What quantizers write beside config.json, and servers read.
FILES = frozenset({"hf_quant_config.json", "quantize_config.json", "quant_config.json"})
# Scales of activations and of the cache.
_ACTIVATIONS = re.compile(r"(.*[._])?(activation|input|output|[kqv]|kv|prob)(_global)?_(scale|zero_point|scale_ub)")


def is_quantized(folder: Path) -> bool:
    """By config.json, also in a part of it such as text_config, or by the file of NVIDIA's Model Optimizer."""
    return _holds(read_json(folder / "config.json")) or (folder / "hf_quant_config.json").is_file()


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without any quantization_config, or what MLX has in its place."""
    of_mlx = config.get("quantization")
    gone = {KEY, "quantization"} if isinstance(of_mlx, dict) and "group_size" in of_mlx else {KEY}
    return {k: without_settings(v) if isinstance(v, dict) else v for k, v in config.items() if k not in gone}


def of_activations(name: str) -> bool:
    """Whether a tensor of a quantized base is a scale of activations: its dequantized model has none."""
    return _ACTIVATIONS.fullmatch(name) is not None


def _holds(config: Mapping[str, Any]) -> bool:
    return bool(config.get(KEY)) or any(_holds(v) for v in config.values() if isinstance(v, dict))
