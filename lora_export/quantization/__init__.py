"""Quantized weights: read into fp32, or quantized and read back as training did."""

from lora_export.quantization.registry import QuantizedWeight, find_quantized
from lora_export.quantization.training import TrainingQuantization, quantized_modules

__all__ = ["QuantizedWeight", "TrainingQuantization", "find_quantized", "quantized_modules"]
