"""How adapters interfere, measured before they are merged: cosines, signs and norms of their deltas."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from math import prod

from lora_export.contracts import Interference, TargetUpdate
from lora_export.deltas.overlap import Overlap
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.rows import base_rows, change_of, load_updates

SEEN = 2**20  # elements of a weight that are looked at, if its rows can be computed separately
OPPOSED = -0.2  # cosines below this are not chance
_RUNS = 8  # places of a weight where they are read


def interference(plan: MergePlan) -> list[Interference]:
    """An entry for each weight and pair of adapters that change it, after those of all weights (tensor: None)."""
    totals: dict[tuple[int, int], Overlap] = {}
    entries: list[Interference] = []
    names = _names(plan)
    for name, tensor in plan.tensors.items():
        parts = _parts(tensor)
        if len(parts) < 2:
            continue
        for pair, overlap in _overlaps(plan, tensor, parts).items():
            totals.setdefault(pair, Overlap()).join(overlap)
            entries.append(_entry(name, names, pair, overlap))
    return [*(_entry(None, names, pair, total) for pair, total in totals.items()), *entries]


def _names(plan: MergePlan) -> list[str]:
    """The adapters' folder names, numbered where two are the same."""
    names = [a.folder.resolve().name for a in plan.adapters]
    return [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _entry(tensor: str | None, names: list[str], pair: tuple[int, int], overlap: Overlap) -> Interference:
    first, second = (names[i] for i in pair)
    return Interference(tensor, first, second, overlap.cosine, overlap.sign_conflicts, overlap.norm_ratio)


def _parts(tensor: PlannedTensor) -> dict[int, tuple[TargetUpdate, ...]]:
    """Which adapter does what with a weight; nothing for a weight that is replaced."""
    updates = [u for update in tensor.updates for part in (update.parts or ((update,),)) for u in part]
    if any(u.replaces for u in updates):
        return {}
    return {owner: tuple(u for u in updates if u.owner == owner) for owner in sorted({u.owner for u in updates})}


def _overlaps(
    plan: MergePlan, tensor: PlannedTensor, parts: dict[int, tuple[TargetUpdate, ...]]
) -> dict[tuple[int, int], Overlap]:
    loaded = {owner: load_updates(replace(tensor, updates=updates), wide=True) for owner, updates in parts.items()}
    weights = {owner: plan.adapters[owner].weight if plan.options.combine != "none" else 1.0 for owner in parts}
    packed = tensor.quantized.load(plan.base) if tensor.quantized else None
    overlaps = {pair: Overlap() for pair in combinations(parts, 2)}
    row_wise = all(u.row_wise(tensor.shape) for updates in parts.values() for u in updates)
    for start, stop in _runs(tensor.shape, row_wise):
        before = base_rows(tensor, packed, start, stop).double()
        deltas = {o: weights[o] * change_of(updates, before, slice(start, stop)) for o, updates in loaded.items()}
        for (first, second), overlap in overlaps.items():
            overlap.add(deltas[first], deltas[second])
    return overlaps


def _runs(shape: tuple[int, ...], row_wise: bool) -> Iterator[tuple[int, int]]:
    """Rows that are looked at: all of a small weight, else some that are spread evenly over it."""
    height, width = shape[0], max(1, prod(shape[1:]))
    if not row_wise or height * width <= SEEN:
        yield 0, height
        return
    length = max(1, SEEN // width // _RUNS)
    for i in range(min(_RUNS, height // length)):
        start = i * (height - length) // max(1, min(_RUNS, height // length) - 1)
        yield start, start + length
