"""Weights that several names share: what an adapter makes of each, and whether they can stay one.

PEFT's forward decides. It wraps one module, and the modules tied to it keep the old weight; a resized vocabulary, a
trained bias, trainable tokens and `ensure_weight_tying` change the shared weight itself, and so every name of it.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter, TargetUpdate, TensorInfo
from lora_export.merging.architecture.model import Architecture
from lora_export.merging.architecture.pieces import StoredPiece
from lora_export.merging.planning.base import BaseWeight
from lora_export.merging.planning.names import usual_pair

Targets = Mapping[str, Sequence[TargetUpdate]]
_LAYER = re.compile(r"(?P<stack>(?:^|.*?\.)[^.\d]+\.)(?P<index>\d+)(?P<rest>\..+)")
_CHUNK = 2**24  # bytes that are compared at once


@dataclass(frozen=True)
class Member:
    """One name of a shared weight: in the model, and in the output (as the base stores it, if it does)."""

    model: str
    name: str
    stored: bool


@dataclass(frozen=True)
class Shared:
    """One weight under several names. updates: what becomes of it under each, in the order of the members."""

    members: tuple[Member, ...]
    updates: tuple[tuple[TargetUpdate, ...], ...] = ()
    alike: bool = True

    @property
    def source(self) -> str:
        """The name that the base stores."""
        return next(m.name for m in self.members if m.stored)


def may_be_shared(targets: Targets, weights: Collection[str]) -> bool:
    """Whether the architecture has to be asked, which takes seconds: not for weights that every layer has."""
    stacks: dict[str, set[str]] = {}
    holders: dict[tuple[str, str], set[str]] = {}
    for name in weights:
        if match := _LAYER.fullmatch(name):
            stacks.setdefault(match["stack"], set()).add(match["index"])
            holders.setdefault((match["stack"], match["rest"]), set()).add(match["index"])
    for name in targets:
        match = _LAYER.fullmatch(name)
        if match is None or name not in weights:
            return True
        if holders[match["stack"], match["rest"]] != stacks[match["stack"]]:
            return True
    return False


def shared_weights(known: Architecture, on_disk: Mapping[str, tuple[StoredPiece, ...]]) -> list[Shared]:
    """Weights of which the base stores one name at least. on_disk: name in the model → tensors of the base."""
    shared = []
    for group in known.ties:
        pieces = [on_disk.get(name, ()) for name in group]
        if any(len(p) > 1 or (p and (p[0].expert is not None or p[0].transposed)) for p in pieces):
            continue  # made of several tensors, or transposed: no embedding is stored so
        members = [Member(n, p[0].name if p else n, bool(p)) for n, p in zip(group, pieces, strict=True)]
        members.sort(key=lambda m: not m.stored)
        if members[0].stored:
            shared.append(Shared(tuple(members)))
    return shared


def shared_by_usual_names(base: Checkpoint, weights: Collection[str]) -> list[Shared]:
    """For models that transformers cannot build: the usual names of an embedding and its head."""
    pair = usual_pair(weights)
    language_model = any("LMHead" in a or "CausalLM" in a for a in base.config.get("architectures") or ())
    if pair is None or not language_model or not base.config.get("tie_word_embeddings", True):
        return []
    return [Shared(tuple(Member(name, name, name in weights) for name in pair))]


def changed(
    groups: Sequence[Shared],
    targets: Targets,
    weights: Mapping[str, BaseWeight],
    adapters: Sequence[Adapter],
    known: Architecture | None,
) -> list[Shared]:
    """The groups that an adapter changes, with what it does to each member."""
    touched = []
    for group in groups:
        if not any(m.name in targets for m in group.members):
            continue
        members = _still_one(group.members, weights)
        if len(members) < 2:
            continue
        lists = [tuple(_of_member(m, members, targets, known)) for m in members]
        alike = all(_do_the_same(a, b, adapters) for a, b in pairwise(lists))
        touched.append(Shared(members, tuple(lists), alike))
    return touched


def _still_one(members: tuple[Member, ...], weights: Mapping[str, BaseWeight]) -> tuple[Member, ...]:
    """Without the names that the base stores with other numbers, which transformers does not tie."""
    first = weights[members[0].name]

    def equal(member: Member) -> bool:
        other = weights[member.name]
        if first.quantized or other.quantized or first.shape != other.shape or first.dtype != other.dtype:
            return False
        return same_bytes(first.info, other.info)

    return tuple(m for m in members if m is members[0] or not m.stored or equal(m))


def _of_member(
    member: Member, members: Sequence[Member], targets: Targets, known: Architecture | None
) -> Iterator[TargetUpdate]:
    """What is done to this name: its own updates, and those that reach it through the tie where it has none."""
    updates: list[TargetUpdate] = []
    owners = sorted({u.owner for m in members for u in targets.get(m.name, ())})
    for owner in owners:
        for effect in ("whole", "tokens", "sum"):
            own = [u for u in targets.get(member.name, ()) if u.owner == owner and _effect(u) == effect]
            if own:
                updates += own
                continue
            for other in members:
                through = [
                    u
                    for given in targets.get(other.name, ())
                    for u in (given, *given.beneath)
                    if given.owner == owner and _effect(u) == effect and _ties(u, other, known)
                ]
                if through:
                    updates += through
                    break
    yield from sorted(updates, key=lambda u: not u.replaces)


def _ties(update: TargetUpdate, member: Member, known: Architecture | None) -> bool:
    """Whether the update changes the shared weight. Trainable tokens do so from the input embedding alone."""
    if not update.tied or not update.tokens or known is None:
        return update.tied
    tied = bool(getattr(known.model.config, "tie_word_embeddings", False))
    return tied and member.model.rpartition(".")[0] == known.input_embedding


def _effect(update: TargetUpdate) -> str:
    """What of a weight it changes: all of it is replaced, some rows of tokens, or all of it by a sum."""
    return "whole" if update.replaces else "tokens" if update.tokens else "sum"


def _do_the_same(
    first: Sequence[TargetUpdate], second: Sequence[TargetUpdate], adapters: Sequence[Adapter]
) -> bool:
    """Whether two lists of updates do the same, although an adapter may store them under two names."""

    def same(a: TargetUpdate, b: TargetUpdate) -> bool:
        if a.keys == b.keys and a.owner == b.owner:
            return True
        if not (a.tied and b.tied) or a.owner != b.owner or a.replaces != b.replaces or a.tokens != b.tokens:
            return False
        stored = adapters[a.owner].tensors
        if _effect(a) == "sum":
            return same_factors([stored[k] for k in a.keys], [stored[k] for k in b.keys])
        return same_bytes(stored[a.keys[0]], stored[b.keys[0]])

    return len(first) == len(second) and all(map(same, first, second))


def same_factors(first: Sequence[TensorInfo], second: Sequence[TensorInfo]) -> bool:
    """Whether A and B of two layers make the same delta: as they are, or as ensure_weight_tying transposes them."""
    if len(first) != 2 or len(second) != 2:
        return False
    if all(map(same_bytes, first, second)):
        return True
    if any(a.shape != b.shape[::-1] for a, b in zip(first, reversed(second), strict=True)):
        return False
    values = [[t.rows(0, t.shape[0]) for t in pair] for pair in (first, second)]
    return all(a.equal(b.T) for a, b in zip(values[0], reversed(values[1]), strict=True))


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors are bitwise equal; both are read."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.file == b.file and a.start == b.start:
        return True
    return all(
        a.read_bytes(start, min(start + _CHUNK, a.nbytes)).equal(b.read_bytes(start, min(start + _CHUNK, a.nbytes)))
        for start in range(0, a.nbytes, _CHUNK)
    )
