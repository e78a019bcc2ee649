"""Greedy decoding around a session of ONNX Runtime, or of what has its methods: graphs with Optimum's names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from tests.consumers.models import RATE, TOKENS, Delivered, sound_of


def features_of(folder: Path, delivered: Delivered) -> Iterator[dict[str, Any]]:
    """What the encoder of an encoder-decoder reads, for each text or sound."""
    if delivered.kind == "speech":
        hear = transformers.AutoFeatureExtractor.from_pretrained(folder)
        for name in delivered.prompts:
            made = hear(sound_of(delivered.root / name), sampling_rate=RATE, return_tensors="np")
            yield {"input_features": made["input_features"]}
    else:
        read = transformers.AutoTokenizer.from_pretrained(folder)
        for text in delivered.prompts:
            yield {k: read(text, return_tensors="np")[k] for k in ("input_ids", "attention_mask")}


def cache_of(session: Any) -> dict[str, Any]:
    """An empty cache: (1, heads, 0, size) for each input that a past has."""
    return {
        i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values")
    }


def _next(session: Any, feeds: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """(the next token, the cache for the next step)."""
    names = [o.name for o in session.get_outputs()]
    known = {i.name for i in session.get_inputs()}
    out = dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in known}), strict=True))
    cache = {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present")}
    return int(out["logits"][0, -1].argmax()), cache


def continued(session: Any, ids: list[int], end: int | None = None) -> list[int]:
    """TOKENS greedy tokens behind a prompt, fewer if `end` is one of them."""
    cache, step, said = cache_of(session), ids, list[int]()
    while len(said) < TOKENS and (not said or said[-1] != end):
        length = len(ids) + len(said)
        places = np.arange(length)[None, -len(step) :]
        feeds = {"input_ids": np.array([step]), "attention_mask": np.ones((1, length), np.int64)}
        token, cache = _next(session, {**feeds, "position_ids": places, **cache})
        said.append(token)
        step = [token]
    return said


def translated(encoder: Any, decoder: Any, given: Mapping[str, Any], start: int, end: int) -> list[int]:
    """TOKENS greedy tokens, fewer before an end of text."""
    states = encoder.run(["last_hidden_state"], dict(given))[0]
    cache, step, said = cache_of(decoder), start, list[int]()
    while len(said) < TOKENS:
        feeds = {
            "input_ids": np.array([[step]]),
            "encoder_hidden_states": states,
            "encoder_attention_mask": given.get("attention_mask"),
            "use_cache_branch": np.array([bool(said)]),
        }
        step, cache = _next(decoder, {**feeds, **cache})
        if step == end:
            break
        said.append(step)
    return said
