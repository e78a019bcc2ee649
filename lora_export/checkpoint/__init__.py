"""Checkpoints on disk: headers distrusted, tensors read by byte range, output shards planned and written."""

from lora_export.checkpoint.adapter_files import open_adapter_files
from lora_export.checkpoint.reader import Checkpoint, TensorFiles, open_checkpoint, refuse_code

__all__ = ["Checkpoint", "TensorFiles", "open_adapter_files", "open_checkpoint", "refuse_code"]
