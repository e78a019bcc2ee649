"""Tokens appended to a tokenizer by its files: tokenizer.json, tokenizer_config.json, added_tokens.json.

A new token gets the id that transformers' `add_tokens` gives it: the number of tokens so far. What a tokenizer does
with other texts does not change.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import CheckpointError
from lora_export.storage.sealed import read_json

WHOLE, SETTINGS, ADDED, VOCABULARY = "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"
_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Tokenizer:
    """folder: of its files; ids: token → id, of the vocabulary and what was added to it."""

    folder: Path
    ids: Mapping[str, int]

    @property
    def end(self) -> int | None:
        """The id of the token that ends a text."""
        settings = _optional(self.folder / SETTINGS) or _optional(self.folder / "special_tokens_map.json") or {}
        token = settings.get("eos_token")
        return self.ids.get(str(token.get("content") if isinstance(token, dict) else token))


def open_tokenizer(folder: Path) -> Tokenizer:
    """By its JSON files. CheckpointError for one that cannot be extended so that its new ids are certain."""
    ids = _vocabulary(folder)
    for name, number in _added(folder):
        if ids.setdefault(name, number) != number:
            raise _odd(folder, f"the token {name!r} has the ids {ids[name]} and {number}")
    if sorted(ids.values()) != list(range(len(ids))):
        raise _odd(folder, "its ids are not 0, 1, 2, … without holes, so the id of a further token is not certain")
    return Tokenizer(folder, ids)


def extended_files(tokenizer: Tokenizer, tokens: Sequence[str]) -> dict[str, bytes]:
    """The files that change, by name, when these tokens follow the last one."""
    folder, first = tokenizer.folder, len(tokenizer.ids)
    new = {token: first + at for at, token in enumerate(tokens)}
    files: dict[str, bytes] = {}
    if whole := _optional(folder / WHOLE):
        entries = [{"id": number, "content": token, **_TOKEN} for token, number in new.items()]
        files[WHOLE] = _text({**whole, "added_tokens": [*(whole.get("added_tokens") or ()), *entries]})
    settings = _optional(folder / SETTINGS) or {}
    if "added_tokens_decoder" in settings:
        entered = {str(number): {"content": token, **_TOKEN} for token, number in new.items()}
        table = {**settings["added_tokens_decoder"], **entered}
        files[SETTINGS] = _text({**settings, "added_tokens_decoder": table})
    elif (folder / ADDED).is_file() or not whole or (folder / VOCABULARY).is_file():
        files[ADDED] = _text({**(_optional(folder / ADDED) or {}), **new})
    return files


def _vocabulary(folder: Path) -> dict[str, int]:
    whole = _optional(folder / WHOLE)
    model = whole.get("model") if whole else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # of Unigram: [token, score]
        return {str(entry[0]): at for at, entry in enumerate(vocabulary)}
    if vocabulary is None and (folder / VOCABULARY).is_file():
        vocabulary = read_json(folder / VOCABULARY)
    if not isinstance(vocabulary, dict) or not all(isinstance(n, int) for n in vocabulary.values()):
        raise _odd(folder, f"its vocabulary is in no {WHOLE} or {VOCABULARY}, so no token can be added to it")
    return dict(vocabulary)


def _added(folder: Path) -> list[tuple[str, int]]:
    """Tokens beside the vocabulary, as all files say."""
    whole = _optional(folder / WHOLE) or {}
    table = (_optional(folder / SETTINGS) or {}).get("added_tokens_decoder") or {}
    try:
        return [
            *((str(a["content"]), int(a["id"])) for a in whole.get("added_tokens") or ()),
            *((str(a["content"]), int(number)) for number, a in table.items()),
            *((str(token), int(number)) for token, number in (_optional(folder / ADDED) or {}).items()),
        ]
    except (KeyError, TypeError, ValueError):
        raise _odd(folder, "a token that was added to it is malformed") from None


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _odd(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        found,
        where=folder,
        expected=f"a tokenizer with {WHOLE} or {VOCABULARY}",
        next_step="save it again with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
    )
