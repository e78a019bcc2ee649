"""Quantized weights: read into fp32, or quantized and read back as training did."""

from lora_export.quantization.registry import (
    QuantizedWeight,
    describe,
    find_quantized,
    method_here,
    method_in,
    method_of,
    quantization_of,
    settings_keys,
)
from lora_export.quantization.training import TrainingQuantization, quantized_modules

__all__ = [
    "QuantizedWeight",
    "TrainingQuantization",
    "describe",
    "find_quantized",
    "method_here",
    "method_in",
    "method_of",
    "quantization_of",
    "quantized_modules",
    "settings_keys",
]
