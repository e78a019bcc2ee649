"""How many numbers a model or an adapter has, from its headers."""

from collections.abc import Mapping
from math import prod

from lora_export.checkpoint import Checkpoint
from lora_export.checkpoint.header import ITEM_BITS
from lora_export.contracts import TensorInfo
from lora_export.errors import LoraExportError
from lora_export.quantization import find_quantized, with_settings


def parameters_of_base(checkpoint: Checkpoint) -> int:
    """Elements of its weights once they are dequantized, if this tool can read them."""
    try:
        quantized = find_quantized(checkpoint, with_settings(checkpoint.folder, checkpoint.config))
    except LoraExportError:
        quantized = {}
    parts = {p for weight in quantized.values() for p in weight.parts}
    rest = {n: t for n, t in checkpoint.tensors.items() if n not in parts}
    return sum(prod(w.shape) for w in quantized.values()) + parameters(rest)


def parameters(tensors: Mapping[str, TensorInfo]) -> int:
    """Elements of float tensors; a 4-bit weight counts its packed bytes twice."""
    count = 0
    for name, info in tensors.items():
        size = prod(info.shape)
        if info.dtype in ("F64", "F32", "F16", "BF16") and not name.endswith((".absmax", "_map", ".SCB")):
            count += size
        elif f"{name}.absmax" in tensors:
            count += 2 * info.nbytes
        elif info.dtype == "I8" or info.dtype not in ITEM_BITS:  # of GGUF, whose shapes are the weights'
            count += size
    return count
