"""Vectors of textual inversion: rows for a text encoder's token embedding, alone in a file or beside a LoRA.

Names: `bundle_emb.NAME.string_to_param.*` and `bundle_emb.NAME.clip_l` (kohya, OneTrainer) in a LoRA file;
`clip_l` and `clip_g`, or `emb_params`, or `<token>` (diffusers' learned_embeds), or `text_encoders_0` (diffusers'
pivotal tuning) in a file of their own.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_export.adapters.kind import AdapterFile

Encoder = Literal["clip_l", "clip_g", "t5"]
_BUNDLED = "bundle_emb."
_IN_BUNDLE = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<part>string_to_param(?:\.[^.]+)?|[^.]+)")
_ENCODERS: Mapping[str, Encoder] = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5", "t5xxl": "t5"}
_BY_NUMBER = re.compile(r"text_encoders_(?P<number>\d)")
_BY_WIDTH = re.compile(r"emb_params|string_to_param(?:\.[^.]+)?")
_TOKEN = re.compile(r"<[^<>]+>")


@dataclass(frozen=True)
class Vectors:
    """The vectors of one text encoder in a tensor (n, width) or (width,).

    tokens: what a prompt says for them, one for each; encoder: which, None for the one of this width; number: of
    the pipeline's encoder, from 0, where the file counts them.
    """

    key: str
    tokens: tuple[str, ...]
    encoder: Encoder | None = None
    number: int | None = None


def vector_names(names: Collection[str]) -> tuple[str, ...]:
    """The tensors that are vectors of textual inversion: those bundled with a LoRA, or all of a file of such."""
    bundled = tuple(n for n in names if n.startswith(_BUNDLED))
    if bundled or not names:
        return bundled
    spelled = (_BY_WIDTH, _BY_NUMBER, _TOKEN)
    known = all(n in _ENCODERS or any(p.fullmatch(n) for p in spelled) for n in names)
    lone = len(names) == 1 and all("." not in n for n in names)  # learned_embeds of a token of any spelling
    return tuple(names) if known or lone else ()


def vectors_of(file: AdapterFile, names: Collection[str]) -> list[Vectors]:
    """What each of these tensors is. AdapterError for one that is no vectors, or whose encoder is not known."""
    return [_vectors(file, name) for name in names]


def _vectors(file: AdapterFile, key: str) -> Vectors:
    count = _count(file, key)
    bundled = _IN_BUNDLE.fullmatch(key)
    name, part = (bundled["name"], bundled["part"]) if bundled else (_stem(file.where), key)
    if _BY_WIDTH.fullmatch(part):
        return Vectors(key, _tokens(file, key, name, count))
    if part in _ENCODERS:
        return Vectors(key, _tokens(file, key, name, count), _ENCODERS[part])
    if bundled:
        raise file.refuse(
            f"the vectors of {name} for {part} have no place in a token embedding",
            tensor=key,
            expected=f"…string_to_param.*, or one of {', '.join(f'…{e}' for e in _ENCODERS)}",
            next_step="use that embedding in the program that it was trained for",
        )
    if number := _BY_NUMBER.fullmatch(part):
        return Vectors(key, tuple(f"<s{i}>" for i in range(count)), number=int(number["number"]))
    return Vectors(key, _tokens(file, key, part, count))


def _count(file: AdapterFile, key: str) -> int:
    shape = file.tensors[key].shape
    if len(shape) not in (1, 2) or 0 in shape:
        raise file.refuse(
            f"the shape is {list(shape)}", tensor=key, expected="vectors of textual inversion, (number, width)"
        )
    return shape[0] if len(shape) == 2 else 1


def _stem(where: Path) -> str:
    return where.stem if where.is_file() or where.suffix == ".safetensors" else where.parent.name


def _tokens(file: AdapterFile, key: str, name: str, count: int) -> tuple[str, ...]:
    """As diffusers' load_textual_inversion calls them: NAME stands for all of NAME, NAME_1, … in its prompts."""
    if name != " ".join(name.split()) or not name.isprintable() or not name:
        raise file.refuse(
            f"{name!r} cannot be a token", tensor=key, expected="a name of printable characters, such as <style>"
        )
    return (name, *(f"{name}_{i}" for i in range(1, count)))
