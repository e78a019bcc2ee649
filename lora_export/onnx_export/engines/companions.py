"""The small files that go into a model's ONNX folder."""

from pathlib import Path

from lora_export.checkpoint.companions import companion_files, copy_files, copy_subfolders
from lora_export.onnx_export.engines import fast_tokenizer
from lora_export.storage import sealed


def copy(source: Path, target: Path) -> None:
    """Copy config.json and every companion file byte for byte: re-saving them has silently changed models.

    A tokenizer that only is SentencePiece's gets a tokenizer.json besides.
    """
    copy_files([*companion_files(source), source / "config.json"], target)
    copy_subfolders(source, target)
    fast_tokenizer.write(target)


def bound_model_max_length(folder: Path, length: int) -> None:
    """Write `length` where tokenizer_config.json says "no limit" with a 31-digit number.

    onnxruntime-genai reads that number as a 64-bit integer. No other key changes.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = sealed.read_json(path)
    if config.get("model_max_length", 0) >= 2**31:
        sealed.write_json(path, {**config, "model_max_length": length})
