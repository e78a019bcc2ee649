"""New adapters: made of several, taken out of a tuned model, brought to a lower rank. All are PEFT folders."""

from lora_export.deriving.combine import combine
from lora_export.deriving.extract import extract
from lora_export.deriving.saving import Derived
from lora_export.deriving.truncate import truncate

__all__ = ["Derived", "combine", "extract", "truncate"]
