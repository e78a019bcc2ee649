"""Which token ends a text, by the files of a tokenizer: no tokenizer is loaded."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.storage.sealed import read_json

_CONFIG, _MAP, _TOKENIZER = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"


def end_of_text(folder: Path) -> tuple[str, int] | None:
    """The token that a folder's tokenizer ends texts with, and its id; None where its JSON files do not say."""
    token = end_token(folder)
    known = (at for found in _ids(folder) if isinstance(at := found.get(token), int)) if token else iter(())
    number = next(known, None)
    return None if token is None or number is None else (token, number)


def end_token(folder: Path) -> str | None:
    """The text of that token."""
    for name in (_CONFIG, _MAP):
        token = _settings(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def ends_of(config: Mapping[str, Any]) -> list[int]:
    """eos_token_id of a configuration, which may be one number, several or none, or be that of its text part."""
    ends = config.get("eos_token_id")
    if ends is None and isinstance(config.get("text_config"), dict):
        ends = config["text_config"].get("eos_token_id")
    return [n for n in (ends if isinstance(ends, list) else [ends]) if isinstance(n, int)]


def _ids(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Tables from tokens to ids, those that are read fastest first."""
    added = _settings(folder / _CONFIG).get("added_tokens_decoder")
    if isinstance(added, dict):
        yield {str(v.get("content")): int(k) for k, v in added.items() if isinstance(v, dict) and k.isdigit()}
    yield _settings(folder / "added_tokens.json")
    whole = _settings(folder / _TOKENIZER)
    yield {a["content"]: a["id"] for a in whole.get("added_tokens") or () if {"content", "id"} <= a.keys()}
    vocabulary = (whole.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # of Unigram: [token, score]
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    yield vocabulary
    yield _settings(folder / "vocab.json")


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
