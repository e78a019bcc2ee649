"""The small files that travel with a model into its ONNX folder."""

from pathlib import Path

from lora_export.checkpoint.companions import companion_files, copy_files, copy_subfolders
from lora_export.storage import sealed


def copy(source: Path, target: Path) -> None:
    """Copy config.json and every companion file, byte for byte: re-saving has silently changed models."""
    copy_files([*companion_files(source), source / "config.json"], target)
    copy_subfolders(source, target)


def bound_model_max_length(folder: Path, length: int) -> None:
    """Write `length` where tokenizer_config.json says "no limit" with a 31-digit number.

    onnxruntime-genai reads that number as an integer of 64 bits; it is the only key that changes.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = sealed.read_json(path)
    if config.get("model_max_length", 0) >= 2**31:
        sealed.write_json(path, {**config, "model_max_length": length})
