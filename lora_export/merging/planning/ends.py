"""The end of a text, where an adapter's tokenizer has another one than its base's.

The model was trained to end with it: a runtime that only knows the old one goes on. transformers' Trainer aligns
the same keys with the tokenizer that it trained with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.checkpoint.companions import has_tokenizer
from lora_export.checkpoint.special_tokens import end_of_text, end_token, ends_of
from lora_export.storage.sealed import read_json

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class NewEnd:
    """config: keys of config.json that change; generation: the new generation_config.json, None without one."""

    token: str
    number: int
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    warning: str


def new_end(base: Path, config: Mapping[str, Any], adapters: Sequence[Path]) -> NewEnd | None:
    """What changes with the tokenizer that is taken from an adapter; None where its end is known already.

    config: the output's config.json. Ends that the base knows stay beside the new one where there is a list.
    """
    homes = [a for a in adapters if has_tokenizer(a)]
    another = bool(homes) and end_token(homes[-1]) not in (None, end_token(base))
    found = end_of_text(homes[-1]) if another else None
    if found is None:
        return None
    token, number = found
    generation = read_json(base / GENERATION) if (base / GENERATION).is_file() else None
    changes = {} if not ends_of(config) or number in ends_of(config) else _in_config(config, number)
    known = ends_of(generation) if generation is not None else []
    follows = generation is not None and bool(known) and number not in known
    if not changes and not follows:
        return None
    if number >= _vocabulary(config):
        why = f"{homes[-1].name} ends texts with {token!r} ({number}), for which the model has no row: not followed"
        return NewEnd(token, number, {}, None, why)
    files = [*(["config.json"] if changes else []), *([GENERATION] if follows else [])]
    return NewEnd(
        token,
        number,
        changes,
        {**(generation or {}), "eos_token_id": [number, *known]} if follows else None,
        f"the adapter's tokenizer ends texts with {token!r}: eos_token_id is {number} in {' and '.join(files)}, "
        f"as the model was trained; the base has {ends_of(config) or known}",
    )


def _in_config(config: Mapping[str, Any], number: int) -> dict[str, Any]:
    home = config if config.get("eos_token_id") is not None else config["text_config"]
    ends = [number, *ends_of(home)] if isinstance(home["eos_token_id"], list) else number
    return {"eos_token_id": ends} if home is config else {"text_config": {**home, "eos_token_id": ends}}


def _vocabulary(config: Mapping[str, Any]) -> int:
    inner = config.get("text_config")
    size = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else 2**31
