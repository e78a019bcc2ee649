"""NVIDIA Model Optimizer's files: fp8, NVFP4, MXFP8, each layer by itself as its tensors tell.

FP8: X.weight F8_E4M3, X.weight_scale fp32, for the tensor, for rows or for blocks. MXFP8: X.weight_scale E8M0 as
bytes, for each 32 of a row. NVFP4: X.weight U8 (out, in/2), X.weight_scale F8_E4M3 (out, in/16), X.weight_scale_2
fp32. X.input_scale and the cache's scales are of activations.
"""

from collections.abc import Mapping
from typing import Any

from lora_export.contracts import TensorSource
from lora_export.quantization.fp4 import fp4_weight
from lora_export.quantization.fp8 import NUMBERS
from lora_export.quantization.scaled import scaled_weight
from lora_export.quantization.stored import ORIGINAL, QuantizedWeight, odd

TENSORS = "tensors such as …q_proj.weight_scale"


def describe(settings: Mapping[str, Any]) -> str:
    return f"modelopt {settings.get('quant_algo', '')}".strip()


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[QuantizedWeight]:
    weights: list[QuantizedWeight] = []
    for name in source.tensors:
        weight = name.removesuffix("_scale")
        if weight == name or weight not in source.tensors:
            continue
        codes, second = source.tensors[weight], f"{weight}_scale_2"
        scaled_inputs = f"{weight.removesuffix('weight')}pre_quant_scale"
        if scaled_inputs in source.tensors:
            raise odd(
                source.tensors[scaled_inputs],
                "this layer scales its inputs before the product (AWQ), which a merged weight cannot do",
                "NVFP4, MXFP8 or FP8 without pre_quant_scale",
                ORIGINAL,
            )
        if codes.dtype in NUMBERS:
            weights.append(scaled_weight(source, weight, name, None, dtype, NUMBERS, None))
        elif codes.dtype == "U8":
            parts = (weight, name, *([second] if second in source.tensors else []))
            weights.append(fp4_weight(source, weight, parts, dtype))
    return weights
