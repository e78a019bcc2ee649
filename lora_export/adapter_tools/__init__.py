"""New adapters: made of several, taken out of a tuned model, brought to a lower rank.

All are PEFT folders; those of pipelines are single files.
"""

from lora_export.adapter_tools.combine import combine
from lora_export.adapter_tools.extract import extract
from lora_export.adapter_tools.files import combine_files, truncate_file
from lora_export.adapter_tools.pipelines import extract_pipeline
from lora_export.adapter_tools.saving import Derived
from lora_export.adapter_tools.truncate import truncate

__all__ = ["Derived", "combine", "combine_files", "extract", "extract_pipeline", "truncate", "truncate_file"]
