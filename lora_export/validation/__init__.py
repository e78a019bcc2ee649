"""Validation: the merged model and its ONNX export against PEFT's unmerged forward, and each tensor in float64."""

from lora_export.contracts import ValidationOptions
from lora_export.validation.run import prepare, streams, validate

__all__ = ["ValidationOptions", "prepare", "streams", "validate"]
