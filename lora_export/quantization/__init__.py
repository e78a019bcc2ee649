"""Quantized weights: read into fp32, or quantized and read back as training did."""

from lora_export.quantization.registry import describe, find_quantized, formats, method_here
from lora_export.quantization.settings import dtype_of, places_of, settings_of, with_settings
from lora_export.quantization.stored import QuantizedWeight
from lora_export.quantization.training import TrainingQuantization, quantized_modules

__all__ = [
    "QuantizedWeight",
    "TrainingQuantization",
    "describe",
    "dtype_of",
    "find_quantized",
    "formats",
    "method_here",
    "places_of",
    "quantized_modules",
    "settings_of",
    "with_settings",
]
