"""The Modelfile of a GGUF package: what `ollama create` reads.

Ollama takes tokenizer and chat template from the GGUF file. What it does not find there, and generation_config.json
says, is written: how tokens are drawn, and the ends of an answer beyond the one that GGUF has a field for.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.storage import sealed

NAME = "Modelfile"
# generation_config.json → Ollama's parameters; of a base that draws tokens.
_DRAWN = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+-]{0,99}", re.ASCII)
_END = re.compile(r'[^"\\\s\x00-\x1f\x7f]{1,100}')  # a token that needs no escape


def text(file: str, tokenizer: Path, licence: str | None) -> str:
    """file: of the model; tokenizer: the folder with generation_config.json and tokenizer.json; licence: an ID."""
    settings = _read(tokenizer / "generation_config.json")
    lines = [f"FROM ./{file}"]
    if settings.get("do_sample"):
        lines += [f"PARAMETER {own} {settings[k]:g}" for k, own in _DRAWN.items() if _is_number(settings.get(k))]
    lines += [f'PARAMETER stop "{end}"' for end in _ends(settings, tokenizer)]
    if licence is not None and _LICENCE.fullmatch(licence):
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n"


def _ends(settings: Mapping[str, Any], tokenizer: Path) -> Iterator[str]:
    """Tokens that end an answer, of a base that has more than one."""
    ids = settings.get("eos_token_id")
    if not isinstance(ids, list):
        return
    added = _read(tokenizer / "tokenizer.json").get("added_tokens") or []
    texts = {t.get("id"): t.get("content") for t in added if isinstance(t, dict)}
    for number in ids:
        content = texts.get(number)
        if isinstance(content, str) and _END.fullmatch(content):
            yield content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> Mapping[str, Any]:
    return sealed.read_json(path) if path.is_file() else {}
