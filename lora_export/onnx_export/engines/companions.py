"""The small files that go into a model's ONNX folder."""

from pathlib import Path

from lora_export.checkpoint.companions import companion_files, copy_files, copy_subfolders
from lora_export.checkpoint.special_tokens import end_of_text, ends_of
from lora_export.onnx_export.engines import fast_tokenizer
from lora_export.storage import sealed


def copy(source: Path, target: Path) -> None:
    """Copy config.json and every companion file byte for byte: re-saving them has silently changed models.

    A tokenizer that only is SentencePiece's gets a tokenizer.json besides.
    """
    copy_files([*companion_files(source), source / "config.json"], target)
    copy_subfolders(source, target)
    fast_tokenizer.write(target)


def follow_ends(folder: Path) -> None:
    """eos_token_id of genai_config.json as the folder's own files have it: the graph may be another model's.

    As the builder decides: the ends of generation_config.json, or else of config.json, and that of the tokenizer.
    """
    path = folder / "genai_config.json"
    sources = (folder / "generation_config.json", folder / "config.json")
    known = (ends for s in sources if s.is_file() and (ends := ends_of(sealed.read_json(s))))
    ends, config = next(known, []), sealed.read_json(path)
    if not ends or ends_of(config["model"]) == ends:
        return
    own = end_of_text(folder)
    ends = ends if own is None or own[1] in ends else [own[1], *ends]
    config["model"]["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    sealed.write_json(path, config)


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
