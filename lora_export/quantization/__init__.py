"""Quantized weights: read into fp32, or quantized and read back as training did."""

from lora_export.quantization.registry import QuantizedWeight, describe, find_quantized, method_of
from lora_export.quantization.training import TrainingQuantization, quantized_modules

__all__ = [
    "QuantizedWeight",
    "TrainingQuantization",
    "describe",
    "find_quantized",
    "method_of",
    "quantized_modules",
]
