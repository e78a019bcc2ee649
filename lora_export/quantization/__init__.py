"""Quantized weights: read into fp32, or quantized and read back as training did."""

from lora_export.quantization.registry import (
    QuantizedWeight,
    describe,
    find_quantized,
    method_here,
    method_of,
)
from lora_export.quantization.settings import dtype_of, places_of, settings_of, with_settings
from lora_export.quantization.training import TrainingQuantization, quantized_modules

__all__ = [
    "QuantizedWeight",
    "TrainingQuantization",
    "describe",
    "dtype_of",
    "find_quantized",
    "method_here",
    "method_of",
    "places_of",
    "quantized_modules",
    "settings_of",
    "with_settings",
]
