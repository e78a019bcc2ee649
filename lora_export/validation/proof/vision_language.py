"""The battery for vision-language models: features of pictures, rows of embeddings, and the decoder on both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_export.graph_runs.signature import EMBEDS, IDS, LOGITS, MASK, POSITIONS, Array, read_as
from lora_export.graph_runs.vision_language import for_graph, placed
from lora_export.validation.comparing.tested_model import setting, takes
from lora_export.validation.kinds.sights import PREFIX, counts_of, seeded
from lora_export.validation.proof.decoder import empty
from lora_export.validation.proof.made_up import Ids, positions_of
from lora_export.validation.proof.trial import Extent, Graphs, Reference, Trial, counted, counted_array

# Pictures of each row of a batch; rows are padded on the left.
_QUICK: Sequence[Sequence[int]] = ((1, 0), (2,), (0, 0, 0))
_FULL: Sequence[Sequence[int]] = ((0, 1, 1), (3,), (1,))
_STEPS = (1, 2)  # tokens behind the pictures that come in steps of their own


@dataclass(frozen=True)
class _Case:
    """ids, mask, kinds (1: of a picture): (rows, tokens); seen: what the model reads of the pictures."""

    ids: torch.Tensor
    mask: torch.Tensor
    kinds: torch.Tensor
    seen: dict[str, torch.Tensor]
    words: str


def trials(model: Reference, graphs: Graphs, extent: Extent) -> Iterator[Trial]:
    if extent.far_only:
        return
    for number, pictures in enumerate((*_QUICK, *(_FULL if extent.full else ()))):
        yield from _trials(model, graphs, _case(model, pictures, number))


def _case(model: Reference, pictures: Sequence[int], number: int) -> _Case:
    config, total = model.config, sum(pictures)
    placeholder = setting(config, "image_token_id", "image_token_index")
    seen = seeded(model.model, total, number + model.seed) if total else {}
    counts = iter(counts_of(model.model, seen, total) if total else ())
    start = setting(config, "vision_start_token_id")
    rows, draw = [], Ids(config)
    for row, own in enumerate(pictures):
        pieces = [_text(draw, 2 + row, (number, row, model.seed))]
        for i in range(own):
            pieces += [torch.tensor([] if start is None else [start]), torch.full((next(counts),), placeholder)]
            pieces.append(_text(draw, 2 + i, (number, row, i, model.seed)))
        pieces.append(_text(draw, 3 + sum(_STEPS), (number, row, "end", model.seed)))
        rows.append(torch.cat(pieces).long())
    longest = max(map(len, rows))
    pad = [torch.nn.functional.pad(ids, (longest - len(ids), 0), value=draw.pad) for ids in rows]
    mask = torch.stack([(torch.arange(longest) >= longest - len(ids)).long() for ids in rows])
    ids = torch.stack(pad)
    words = f"batch {len(rows)}, pictures {', '.join(map(str, pictures))}, length {longest}"
    return _Case(ids, mask, (ids == placeholder).long() * mask, seen, words)


def _text(draw: Ids, length: int, seed: object) -> torch.Tensor:
    return draw(torch.ones(1, length, dtype=torch.long), seed, tame=True)[0]


def _trials(model: Reference, graphs: Graphs, case: _Case) -> Iterator[Trial]:
    vision, embedding, _ = graphs.names
    found, failure = graphs.run(embedding, {IDS: case.ids})
    with torch.no_grad():
        words = model.model.get_input_embeddings()(_known(model, case.ids)).float()
    keep = case.mask * (1 - case.kinds)
    shown = {EMBEDS: counted_array(found[EMBEDS][..., : words.shape[-1]], keep)} if found else {}
    yield Trial(
        f"embeddings, {case.words}", embedding, {IDS: case.ids}, {EMBEDS: counted(words, keep)}, shown, failure
    )
    if failure:
        return
    rows = found[EMBEDS].copy()
    if case.seen:
        trial, features = _pictures(model, graphs, vision, case)
        yield trial
        if trial.failure:
            return
        if len(features) == int(case.kinds.sum()):
            rows[case.kinds.bool().numpy()] = features
    yield from _decoder(model, graphs, case, rows)


def _pictures(model: Reference, graphs: Graphs, name: str, case: _Case) -> tuple[Trial, Array]:
    """The vision tower's graph; its features, with what else stands in their rows."""
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in case.seen.items()}
    with torch.no_grad():
        made = model.model.get_image_features(**given, return_dict=True)
    wanted = torch.cat(
        [_joined(made.pooler_output), *map(_joined, getattr(made, "deepstack_features", None) or ())], -1
    )
    parts, failure = [], ""
    feeds = for_graph(graphs.signature(name), {k: v.numpy() for k, v in case.seen.items()})
    for feed in feeds:
        found, failure = graphs.run(name, feed)
        if failure:
            break
        parts.append(found["image_features"])
    features = np.concatenate(parts) if not failure else np.zeros((0, wanted.shape[-1]), np.float32)
    shown = {} if failure else {"image_features": features[:, : wanted.shape[-1]]}
    expected = {"image_features": wanted.float()}
    return Trial(f"pictures, {case.words}", name, feeds[0], expected, shown, failure), features


def _joined(features: Any) -> torch.Tensor:
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def _decoder(model: Reference, graphs: Graphs, case: _Case, rows: Array) -> Iterator[Trial]:
    """Prompts with their pictures at once, then steps; PyTorch computes the whole from ids and pictures."""
    name, length = graphs.names[-1], case.ids.shape[1]
    signature = graphs.signature(name)
    positions = _positions(model, case, len(signature.inputs[POSITIONS].shape))
    given: dict[str, Any] = {IDS: case.ids, MASK: case.mask, POSITIONS: positions, **case.seen}
    first = length - sum(_STEPS)
    if "token_type_ids" in takes(model.model):
        later = (torch.arange(length) >= first).long().expand(case.ids.shape)
        given["token_type_ids"] = later if model.config.model_type in PREFIX else case.kinds
    whole = model(**given).logits.float()
    states, at = empty(signature, len(rows)), 0
    for size in (first, *_STEPS):
        now = slice(at, at + size)
        feed = {
            **states, EMBEDS: rows[:, now], MASK: case.mask[:, : at + size], POSITIONS: positions[..., now],
        }  # fmt: skip
        found, failure = graphs.run(name, feed)
        counts = case.mask[:, now]
        how = f"the decoder, {case.words}, {size} tokens" + (f" behind a cache of {at}" if at else " at once")
        shown = {} if failure else {LOGITS: counted_array(found[LOGITS], counts)}
        yield Trial(how, name, feed, {LOGITS: counted(whole[:, now], counts)}, shown, failure)
        if failure:
            return
        states = {read_as(n): v for n, v in found.items() if n != LOGITS}
        at += size


def _positions(model: Reference, case: _Case, rank: int) -> torch.Tensor:
    """Of both sides: (rows, tokens), or (3, rows, tokens) in time, height and width."""
    plain = positions_of(case.mask)
    if rank == plain.dim():
        return plain
    merge = setting(model.config.vision_config, "spatial_merge_size") or 1
    placeholder = setting(model.config, "image_token_id", "image_token_index")
    grids = case.seen.get("image_grid_thw")
    made = torch.zeros((3, *case.ids.shape), dtype=torch.long)
    at = 0
    for row, (ids, mask) in enumerate(zip(case.ids, case.mask.bool(), strict=True)):
        own = ids[mask].numpy()
        seen = {} if grids is None else {"image_grid_thw": grids[at:].numpy()}
        made[:, row, mask] = torch.from_numpy(placed(own, seen, placeholder, merge))
        at += _pictures_in(case.kinds[row], grids, at, merge)
    return made


def _pictures_in(kinds: torch.Tensor, grids: torch.Tensor | None, at: int, merge: int) -> int:
    """How many of the pictures from `at` on belong to a row."""
    left, count = int(kinds.sum()), 0
    while left and grids is not None:
        left -= int(grids[at + count].prod()) // merge**2
        count += 1
    return count


def _known(model: Reference, ids: torch.Tensor) -> torch.Tensor:
    """Ids that the embedding has: a placeholder may lie beyond them."""
    return torch.where(ids < model.model.get_input_embeddings().num_embeddings, ids, 0)
