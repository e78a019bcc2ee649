"""Lengths of text on which models are compared: drawn anew at each run, and where a model computes otherwise.

A sliding window, a chunk of attention, a rope that is stretched beyond its original length: a fault there shows in
no shorter text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lora_export.validation.comparing.tested_model import generates, setting

DRAWN = 2
LONGEST_DRAWN = 512
# Parameters × tokens of one forward, of which a validation makes about ten.
DRAWN_ARITHMETIC = 2 * 10**11
MOST_ARITHMETIC = 10**12
SHARE = 64  # of the memory that is available, for the fp32 logits of one text: several of them are kept
LEAST = 64  # tokens, however large the model is
_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "attention_window", "window_size")
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Lengths:
    """tokens: each length that is run; words: the lengths, the seed, and what is too long to run, in words."""

    tokens: tuple[int, ...]
    words: str


def choose(model: Any, seed: int, vocabulary: int) -> Lengths:
    """vocabulary: the width of the logits."""
    positions = most_positions(model)
    longest = min(positions or LONGEST_DRAWN, LONGEST_DRAWN, _affordable(model, vocabulary, DRAWN_ARITHMETIC))
    most = _affordable(model, vocabulary, MOST_ARITHMETIC)
    most = most if positions is None else min(positions, most)
    generator = torch.Generator().manual_seed(seed)
    drawn = {_between(min(2, longest), longest, generator) for _ in range(DRAWN)}
    at: set[int] = set()
    beyond: list[str] = []
    for name, length in sorted(marks(model.config).items()):
        if positions is not None and length >= positions:
            continue  # no text of this model reaches beyond it
        if length >= most:
            beyond.append(f"{name} {length:,}")
        else:
            at |= {length, length + 1, min(most, length + 1 + _between(1, max(1, length // 4), generator))}
    if positions == most:
        at.add(positions)
    elif positions is not None:
        beyond.append(f"the last of {positions:,} positions")
    runs = tuple(sorted(n for n in drawn | at if n >= 2))
    words = f"also on texts of {', '.join(map(str, runs))} tokens, drawn with seed {seed}"
    if beyond:
        words += f"; too long to run here, where {most:,} tokens are the most: {', '.join(beyond)}"
    return Lengths(runs, words)


def most_positions(model: Any) -> int | None:
    """How many tokens a text may have; None if nothing limits it.

    RoBERTa counts positions from its padding id on; the table of its positions tells. ProphetNet, which predicts
    several tokens ahead, looks up one position more.
    """
    config = model.config.get_text_config()
    known = setting(config, "max_position_embeddings", "max_target_positions", "max_decoder_position_embeddings")
    if not isinstance(known, int) or known < 2:
        return None
    tables = (m for n, m in model.named_modules() if n.endswith("position_embeddings"))
    skipped = max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)
    skipped += 1 if setting(config, "ngram") else 0
    return max(known - skipped, min(known // 2, 8))


def marks(config: Any) -> dict[str, int]:
    """Name of a setting → the number of tokens up to which a model computes in one way."""
    return dict(_marks(config.get_text_config()))


def _marks(text: Any) -> Iterator[tuple[str, int]]:
    for name in _WINDOWS:
        if name == "sliding_window" and getattr(text, "use_sliding_window", True) is False:
            continue
        value = getattr(text, name, None)
        sizes = value if isinstance(value, list | tuple) else [value]
        lengths = [v for v in sizes if isinstance(v, int) and not isinstance(v, bool) and v > 1]
        if lengths:
            yield name, max(lengths)
    ropes = [getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")]
    stated = [getattr(text, _ORIGINAL, None), *(v for rope in ropes for v in _originals(rope))]
    known = [v for v in stated if isinstance(v, int) and not isinstance(v, bool) and v > 1]
    if known:
        yield _ORIGINAL, max(known)


def _originals(rope: Any) -> Iterator[Any]:
    """Of one rope, or of one for each type of layer."""
    if isinstance(rope, Mapping):
        yield rope.get(_ORIGINAL)
        for value in rope.values():
            yield from _originals(value)


def _affordable(model: Any, vocabulary: int, arithmetic: int) -> int:
    """Tokens of one text that take neither too long nor too much memory."""
    parameters = sum(p.numel() for p in model.parameters())
    tokens = arithmetic // max(1, parameters)
    if generates(model):
        tokens = min(tokens, psutil.virtual_memory().available // SHARE // (4 * max(1, vocabulary)))
    return max(LEAST, int(tokens))


def _between(least: int, most: int, generator: torch.Generator) -> int:
    return int(torch.randint(least, most + 1, (1,), generator=generator))
