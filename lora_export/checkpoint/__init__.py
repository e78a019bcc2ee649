"""Checkpoints on disk: headers distrusted, tensors read by byte range, output shards planned and written."""

from lora_export.checkpoint.adapter_files import open_adapter_files
from lora_export.checkpoint.reader import Checkpoint, open_checkpoint, refuse_code
from lora_export.checkpoint.tensor_files import TensorFiles

__all__ = ["Checkpoint", "TensorFiles", "open_adapter_files", "open_checkpoint", "refuse_code"]
