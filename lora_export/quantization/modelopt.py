"""NVIDIA Model Optimizer's files: fp8, NVFP4, MXFP8, each layer by itself as its tensors tell.

FP8: X.weight F8_E4M3, X.weight_scale fp32, for the tensor, for rows or for blocks. MXFP8: X.weight_scale E8M0 as
bytes, for each 32 of a row. NVFP4: X.weight U8 (out, in/2), X.weight_scale F8_E4M3 (out, in/16), X.weight_scale_2
fp32. X.input_scale and the cache's scales are of activations.
"""

from collections.abc import Mapping
from typing import Any

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.fp4 import Fp4Weight, fp4_weight
from lora_export.quantization.fp8 import NUMBERS
from lora_export.quantization.scaled import ScaledWeight, scaled_weight


def find(source: TensorSource, settings: Mapping[str, Any], dtype: str) -> list[ScaledWeight | Fp4Weight]:
    """Every weight with a `weight_scale`, checked by headers; dtype: what the model computes in."""
    found: list[ScaledWeight | Fp4Weight] = []
    for name in source.tensors:
        weight = name.removesuffix("_scale")
        if weight == name or weight not in source.tensors:
            continue
        codes, second = source.tensors[weight], f"{weight}_scale_2"
        turned = f"{weight.removesuffix('weight')}pre_quant_scale"
        if turned in source.tensors:
            raise CheckpointError(
                "this layer's inputs are scaled before the product (AWQ), which no merged weight is",
                where=codes.file,
                tensor=turned,
                expected="NVFP4, MXFP8 or FP8 without pre_quant_scale",
                next_step="give the unquantized base model that this one was made from as -b",
            )
        if codes.dtype in NUMBERS:
            found.append(scaled_weight(source, weight, name, None, dtype, NUMBERS, None))
        elif codes.dtype == "U8":
            parts = (weight, name, *([second] if second in source.tensors else []))
            found.append(fp4_weight(source, weight, parts, dtype))
    return found
