"""Adapters: adapter_config.json and its tensors → one update for each target weight."""

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.registry import CONFIG, kinds, read_adapter

__all__ = ["CONFIG", "AdapterFile", "kinds", "read_adapter"]
