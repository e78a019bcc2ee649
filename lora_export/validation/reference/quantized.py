"""Quantized bases: which files and tensors they have, and weights through bitsandbytes and back."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_export.choices import Requantization
from lora_export.storage.sealed import read_json

KEY = "quantization_config"
# What quantizers write beside config.json, and servers read.
FILES = frozenset({"hf_quant_config.json", "quantize_config.json", "quant_config.json"})
BLOCKSIZE = 64  # elements; bitsandbytes' own for its 4-bit layers
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


def requantize(model: nn.Module, method: Requantization, double: bool, dtypes: Mapping[str, torch.dtype]) -> None:
    """Change an fp32 model's weights in place to what `from_pretrained` with a quantization_config computes with.

    double: the block scales are quantized too; dtypes: of the stored tensors by name, which is what is quantized
    (fp32 for a name that is not in it).
    """
    for name, layer in convertible(model):
        stored = layer.weight.data.to(dtypes.get(f"{name}.weight", torch.float32))
        turned = isinstance(layer, Conv1D)  # it becomes a linear layer when it is quantized
        weight = round_trip(stored.T.contiguous() if turned else stored, method, double)
        layer.weight.data = weight.T.contiguous() if turned else weight


def convertible(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that transformers gives to bitsandbytes: linear ones, without the output head and tied layers."""
    kept = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if should_convert_module(name, kept) and (type(module) is nn.Linear or isinstance(module, Conv1D)):
            yield name, module


def round_trip(weight: torch.Tensor, method: Requantization, double: bool) -> torch.Tensor:
    """dequantize(quantize(weight)) in fp32; weight (out, in) in any floating type."""
    from bitsandbytes import functional as bnb

    if method == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        rows: torch.Tensor = bnb.int8_vectorwise_dequant(codes, scales).float()
        return rows
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=BLOCKSIZE, quant_type=method, compress_statistics=double
    )
    return dequantize_4bit(packed, state).reshape(weight.shape)


def dequantize_4bit(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """bitsandbytes' dequantized weight in fp32, as one row; `state` is changed to that shape and type."""
    from bitsandbytes import functional as bnb

    state.dtype = torch.float32
    # As one row: bitsandbytes' AVX-512 kernel misplaces the blocks where a row does not end with one.
    state.shape = torch.Size((1, state.shape.numel()))
    weight: torch.Tensor = bnb.dequantize_4bit(packed, state)
    return weight
