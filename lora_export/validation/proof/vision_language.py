"""The battery for models that see and write: texts with pictures and without, through all graphs of an export."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lora_export.errors import LoraExportError
from lora_export.graph_runs.runs import State
from lora_export.graph_runs.signature import EMBEDS, IDS, LOGITS, MASK, POSITIONS
from lora_export.graph_runs.vision_language import VisionLanguage
from lora_export.validation.kinds.sights import seeded_pictures, token_counts
from lora_export.validation.proof.made_up import Ids
from lora_export.validation.proof.trial import Extent, Graphs, Reference, Trial

_BEFORE, _BEHIND = 3, 7  # tokens of text around the pictures


def trials(model: Reference, graphs: Graphs, extent: Extent) -> Iterator[Trial]:
    """One picture, two, and none; the text behind them in further steps."""
    config = model.config
    placeholder = _setting(config, "image_token_id", "image_token_index")
    if placeholder is None:
        return
    merge = _setting(config.vision_config, "spatial_merge_size") or 1
    paths = [graphs.folder / name for name in graphs.names]
    runs = VisionLanguage(paths, graphs.provider, placeholder, merge)
    for count in (1, 2, 0, *((3,) if extent.full else ())):
        seen = seeded_pictures(model.model, count) if count else {}
        with torch.no_grad():
            tokens = token_counts(model.model, seen) if count else []
        ids = _text(model, placeholder, tokens)
        yield from _steps(model, graphs, runs, ids, seen, placeholder)


def _setting(config: Any, *names: str) -> Any:
    return next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)


def _text(model: Reference, placeholder: int, tokens: list[int]) -> torch.Tensor:
    """Ids (1, length): text, the pictures' places behind the mark that begins them, text."""
    start = _setting(model.config, "vision_start_token_id")
    text = Ids(model.config)(torch.ones(1, _BEFORE + _BEHIND, dtype=torch.long), ("text", model.seed), tame=True)[0]
    text = torch.where(text == placeholder, int(placeholder == 0), text)
    marks = [] if start is None else [start]
    pictures = [torch.tensor([*marks, *[placeholder] * n], dtype=torch.long) for n in tokens]
    return torch.cat([text[:_BEFORE], *pictures, text[_BEFORE:]])[None]


def _steps(
    model: Reference,
    graphs: Graphs,
    runs: VisionLanguage,
    ids: torch.Tensor,
    seen: Mapping[str, torch.Tensor],
    placeholder: int,
) -> Iterator[Trial]:
    kinds = {"mm_token_type_ids": (ids == placeholder).long(), "token_type_ids": (ids == placeholder).long()}
    taken = {n: v for n, v in kinds.items() if n in _inputs(model)}
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **seen, **taken)[LOGITS].float()
    arrays = {name: value.numpy() for name, value in seen.items()}
    decoder, words = graphs.names[-1], f"{_pictures(ids, placeholder)}, {ids.shape[1]} tokens"
    try:
        rows, positions = runs.rows(ids.numpy(), arrays), runs.positions(ids[0].numpy(), arrays)
    except Exception as error:  # ONNX Runtime's exceptions share no base but this one
        yield Trial(words, graphs.names[0], arrays, {LOGITS: expected}, {}, _reason(error))
        return
    before = ((graphs.names[0], arrays), (graphs.names[1], {IDS: ids.numpy()}))
    state, at = State(), 0
    for length in (ids.shape[1] - 4, 1, 3):
        now, mask = slice(at, at + length), np.ones((1, at + length), np.int64)
        feed = {EMBEDS: rows[:, now], MASK: mask, POSITIONS: positions[..., now], **state.values}
        found, failure = {}, ""
        try:
            logits, state = runs.step(rows[:, now], mask, positions[..., now], state)
            found = {LOGITS: logits}
        except Exception as error:
            failure = _reason(error)
        how = f"{words}, {length} behind a cache of {at}" if at else f"{words}, {length} at once"
        yield Trial(how, decoder, feed, {LOGITS: expected[:, now]}, found, failure, before=before if not at else ())
        if failure:
            return
        at += length


def _inputs(model: Reference) -> Mapping[str, Any]:
    import inspect

    return inspect.signature(model.model.forward).parameters


def _pictures(ids: torch.Tensor, placeholder: int) -> str:
    count = int((ids == placeholder).sum())
    return f"a text with {count} places of pictures" if count else "a text without pictures"


def _reason(error: Exception) -> str:
    return error.found if isinstance(error, LoraExportError) else " ".join(str(error).split())
