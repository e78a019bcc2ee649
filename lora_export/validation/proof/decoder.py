"""The battery for decoders: prompts, steps with a growing cache, padding, far regions behind a made-up one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lora_export.graph_runs.signature import IDS, MASK, POSITIONS, Array, Signature, read_as
from lora_export.validation.proof.made_up import Ids, Sizes, generator, mask_of, positions_of
from lora_export.validation.proof.single import borders, rope_types, rounded
from lora_export.validation.proof.trial import (
    Extent,
    Graphs,
    Reference,
    Trial,
    counted,
    counted_array,
    expert_count,
    outputs_of,
)

LARGEST_CACHE = 256 * 2**20  # bytes in fp32
SHORT, LONG = 300, 8192  # tokens of a prompt that quick and full proofs run at once
BEHIND = 8  # tokens that are tried behind a border
EXPERT_TOKENS, EXPERT_ROUNDS = 512, 8
NEAR = 4  # keys at a border whose values are made large: one more or less of them must show


@dataclass
class Decoding:
    """One sequence of steps on both sides. seen: tokens so far; past: PyTorch's cache; states: the graph's; whole:
    PyTorch's outputs for the whole sequence at once, where its steps give the same."""

    model: Reference
    graphs: Graphs
    name: str
    ids: torch.Tensor
    mask: torch.Tensor
    words: str
    limit: bool = False
    seen: int = 0
    past: Any = None
    states: dict[str, Array] = field(default_factory=dict)
    broken: bool = False
    whole: Any = None

    @property
    def signature(self) -> Signature:
        return self.graphs.signature(self.name)

    def steps(self, *lengths: int) -> Iterator[Trial]:
        if not self.seen and len(lengths) > 1 and at_once(self.model, self.signature):
            end = sum(lengths)
            self.whole = self._torch(slice(0, end), self.mask[:, :end])
        for length in lengths:
            if self.broken:
                return
            yield self._step(length)

    def _torch(self, now: slice, mask: torch.Tensor) -> Any:
        """PyTorch's outputs for these tokens, behind those that its cache has seen."""
        given = {IDS: self.ids[:, now], MASK: mask, POSITIONS: positions_of(mask)[:, now]}
        read = {n: v for n, v in given.items() if n != POSITIONS or _takes(self.model.model, n)}
        return self.model(**read, past_key_values=self.past, use_cache=True)

    def _expected(self, now: slice, mask: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        if self.whole is not None:
            return {n: self.whole[n][:, now].float() for n in names if n in self.whole}
        result = self._torch(now, mask)
        self.past = result.past_key_values
        return {n: result[n].float() for n in names if n in result}

    def _step(self, length: int) -> Trial:
        now = slice(self.seen, self.seen + length)
        mask = self.mask[:, : self.seen + length]
        given = {IDS: self.ids[:, now], MASK: mask, POSITIONS: positions_of(mask)[:, now]}
        expected = self._expected(now, mask, outputs_of(self.signature))
        feed = {**(self.states or empty(self.signature, len(mask))), **given}
        found, failure = self.graphs.run(self.name, feed)
        self.states = {read_as(n): v for n, v in found.items() if read_as(n) in self.signature.inputs}
        self.broken = bool(failure)
        seen, self.seen = self.seen, self.seen + length
        how = f"{self.words}, {length} tokens" + (f" behind a cache of {seen}" if seen else " at once")
        counts = mask[:, now]
        return Trial(
            how,
            self.name,
            feed,
            {n: counted(v, counts) for n, v in expected.items()},
            {n: counted_array(found[n], counts) for n in expected if n in found},
            failure,
            self.limit,
        )


def trials(model: Reference, graphs: Graphs, extent: Extent) -> Iterator[Trial]:
    """Every case: short ones first, so that a graph that is wrong everywhere is found at once."""
    name = graphs.names[-1]
    ids = Ids(model.config)

    def decoding(sizes: Sizes, extra: int, **how: Any) -> Decoding:
        mask = mask_of(sizes)
        mask = torch.cat([mask, torch.ones(sizes.rows, extra, dtype=torch.long)], 1)
        return Decoding(model, graphs, name, ids(mask, (sizes, model.seed)), mask, sizes.words, **how)

    if not extent.far_only:
        yield from _near(decoding, graphs.packs_rows(name), extent.full)
        yield from _experts(model, decoding)
    places = _learned_positions(model.model)
    for what, border in sorted(borders(model.config).items(), key=lambda b: b[1]):
        if border + BEHIND <= places and not left_to_fewer_layers(graphs.signature(name), border, extent):
            yield from _far(model, graphs, name, decoding, what, border, extent.full)


def _learned_positions(model: Any) -> float:
    """How many positions a model has learned; nothing lies beyond the last of them."""
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    return max((m.num_embeddings for n, m in embeddings.items() if "pos" in n or "wpe" in n), default=math.inf)


def _near(decoding: Any, packs: bool, full: bool) -> Iterator[Trial]:
    """Prompts, steps, and padding on both sides. packs: as Graphs.packs_rows."""
    yield from decoding(Sizes(3, 4), 2).steps(4, 1, 1)
    yield from decoding(Sizes(1, 9), 4).steps(9, 3, 1)
    yield from decoding(Sizes(2, 7, "right"), 0).steps(7)
    later = (1,) if packs else (1, 2)
    yield from decoding(Sizes(3, 7, "left"), sum(later), limit=packs).steps(7, *later)
    if full:
        yield from decoding(Sizes(3, 7), 5).steps(7, 1, 1, *(() if packs else (3,)))
        yield from decoding(Sizes(4, 40, "left"), 9, limit=packs).steps(40, *[1] * 9)
        yield from decoding(Sizes(1, 64), 40).steps(64, *[1] * 32, 8)


def _far(
    model: Reference, graphs: Graphs, name: str, decoding: Any, what: str, border: int, full: bool
) -> Iterator[Trial]:
    """Around a border: prompts at once where they are short, steps behind a made-up cache where they are not."""
    if _short(border, full):
        yield from decoding(Sizes(1, border + 7), 0).steps(border + 7)
        near = max(2, border - 3)
        yield from decoding(Sizes(1, near), 8).steps(near, 1, 5, 1, 1)
        yield from decoding(Sizes(1, max(2, border // 2)), border).steps(max(2, border // 2), border)
        return
    signature = graphs.signature(name)
    if not has_plain_cache(signature):
        return
    for past, length in ((border - 2, 1), (border, 1), (border - 3, 6), (border + 3, 2)):
        begun = decoding(Sizes(1, past), length)
        made = made_up_cache(signature, past, border)
        begun.past, begun.states, begun.seen = torch_cache(model, made), made, past
        begun.words = f"batch 1, at the {what} of {border}"
        yield from begun.steps(length)


def unreached(model: Reference, graphs: Graphs, extent: Extent) -> list[str]:
    """What the battery leaves out, in words."""
    left = []
    signature = graphs.signature(graphs.names[-1])
    for what, border in borders(model.config).items():
        if not _short(border, extent.full) and not has_plain_cache(signature):
            left.append(f"beyond the {what} of {border}: states of this kind cannot be made up")
    return left


def left_to_fewer_layers(signature: Signature, border: int, extent: Extent) -> bool:
    """Whether a cache up to a border is too large for the whole model, and is tried on its first layers."""
    if extent.far_only or _short(border, extent.full) or not has_plain_cache(signature):
        return False
    caches = (n for n, v in signature.inputs.items() if v.is_cache)
    size = sum(4 * math.prod(signature.cache_shape(n, 1, border)) for n in caches)
    return extent.streamed or size > LARGEST_CACHE


def _short(border: int, full: bool) -> bool:
    """Whether prompts reach a border at once."""
    return border <= (LONG if full else SHORT)


def _experts(model: Reference, decoding: Any) -> Iterator[Trial]:
    """Tokens until every expert has been chosen, or no more come."""
    counts = {path: expert_count(m) for path, m in model.model.named_modules() if expert_count(m)}
    if not counts:
        return
    tokens = min(EXPERT_TOKENS, 8 * max(counts.values()))
    for number in range(EXPERT_ROUNDS):
        before = sum(map(len, model.visited.values()))
        begun = decoding(replace(Sizes(1, tokens + number), rows=1), 0)
        yield from begun.steps(tokens + number)
        visited = {path: len(model.visited.get(path, ())) for path in counts}
        if all(visited[p] >= counts[p] for p in counts) or sum(visited.values()) == before:
            return


def at_once(model: Reference, signature: Signature) -> bool:
    """Whether PyTorch computes a sequence at once as it does step by step: without states that are summed up, and
    without rotary positions that depend on the length so far."""
    return not model.watch and has_plain_cache(signature) and not rope_types(model.config) & {"dynamic", "longrope"}


# --- caches ------------------------------------------------------------------------------------------------


def empty(signature: Signature, rows: int) -> dict[str, Array]:
    """States before the first token: caches without entries, zeros for what has a fixed size."""
    states = {}
    for name, value in signature.inputs.items():
        if not value.is_cache:
            continue
        if len(value.shape) == 4 and sum(isinstance(d, str) for d in value.shape) > 1:
            states[name] = np.zeros(signature.cache_shape(name, rows, 0), value.dtype)
            continue
        shape = [rows, *(d if isinstance(d, int) else 0 for d in value.shape[1:])]
        states[name] = np.zeros(shape, value.dtype)
    return states


def has_plain_cache(signature: Signature) -> bool:
    """Whether every state is a key or a value, (rows, heads, length, size)."""
    caches = [n for n, v in signature.inputs.items() if v.is_cache]
    return bool(caches) and all(n.endswith((".key", ".value")) for n in caches)


def made_up_cache(signature: Signature, length: int, border: int) -> dict[str, Array]:
    """Random keys and values; the values next to where a window of `border` tokens ends are large."""
    made = {}
    for name in (n for n, v in signature.inputs.items() if v.is_cache):
        shape = signature.cache_shape(name, 1, length)
        values = torch.randn(shape, generator=generator(name, length))
        if name.endswith(".value"):
            end = length + 1 - border
            values[:, :, max(0, end - NEAR) : max(0, end + NEAR)] *= max(1.0, math.sqrt(border))
        made[name] = rounded(values, signature.inputs[name]).numpy().astype(signature.inputs[name].dtype)
    return made


def torch_cache(model: Reference, made: Mapping[str, Array]) -> Any:
    """transformers' cache after it was given these keys and values at once."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    layers: Sequence[str] = sorted({n.rpartition(".")[0] for n in made}, key=lambda n: int(n.split(".")[1]))
    for number, layer in enumerate(layers):
        key, value = (
            torch.from_numpy(made[f"{layer}.{w}"].astype(np.float32)).to(model.dtype) for w in ("key", "value")
        )
        cache.update(key, value, number)
    return cache


def _takes(model: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters
