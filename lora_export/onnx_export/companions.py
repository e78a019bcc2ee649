"""The small files that travel with a model: copied byte for byte: re-saving has silently changed models."""

import shutil
from pathlib import Path

from lora_export import files

TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL = ("config.json", "generation_config.json")
SENTENCE_TRANSFORMERS = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


def copy(source: Path, target: Path) -> None:
    """Copy every companion file that `source` has; code (`*.py`) is never among them."""
    for name in (*TOKENIZER, *MODEL, *SENTENCE_TRANSFORMERS):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def bound_model_max_length(folder: Path, length: int) -> None:
    """Write `length` where tokenizer_config.json says "no limit" with a 31-digit number.

    onnxruntime-genai reads that number as an integer of 64 bits; it is the only key that changes.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = files.read_json(path)
    if config.get("model_max_length", 0) >= 2**31:
        files.write_json(path, {**config, "model_max_length": length})


def has_tokenizer(folder: Path) -> bool:
    present = {p.name for p in folder.iterdir()}
    sets = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"}, {"vocab.txt"})
    return any(needed <= present for needed in sets)
