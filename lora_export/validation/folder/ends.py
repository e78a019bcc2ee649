"""The end of a text in the settings of a merged folder, after the tokenizer that an adapter brings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_export.folder_files import is_whole_tokenizer
from lora_export.storage.sealed import read_json, write_json

_KEY = "eos_token_id"


def follow(base: Path, adapters: Sequence[Path], config: dict[str, Any], folder: Path) -> None:
    """Set eos_token_id in `config` and in the generation_config.json of `folder` where the adapter's text ends with
    another token than the base's. An id without a row in the model changes nothing."""
    own = [a for a in adapters if is_whole_tokenizer(p.name for p in a.iterdir())]
    token = _token(own[-1]) if own else None
    if token is None or token == _token(base):
        return
    number, rows = _number(own[-1], token), (config.get("text_config") or {}).get("vocab_size")
    if number is None or number >= (config.get("vocab_size") or rows or number + 1):
        return
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get(_KEY) is not None:
            if number not in _several(part[_KEY]):
                part[_KEY] = [number, *part[_KEY]] if isinstance(part[_KEY], list) else number
            break
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    ends = _several(generation.get(_KEY))
    if ends and number not in ends:
        write_json(path, generation | {_KEY: [number, *ends]})


def _several(ends: Any) -> list[Any]:
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _token(folder: Path) -> Any:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(folder / name).get("eos_token") if (folder / name).is_file() else None
        if token is not None:
            return token["content"] if isinstance(token, dict) else token
    return None


def _number(folder: Path, token: str) -> int | None:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        number: int | None = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
        return number
    added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    names = [int(n) for n, entry in added.items() if entry.get("content") == token]
    listed = [folder / name for name in ("added_tokens.json", "vocab.json") if (folder / name).is_file()]
    return next(iter(names), None) or next((n for p in listed if (n := read_json(p).get(token)) is not None), None)
