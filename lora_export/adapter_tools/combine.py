"""Several adapters as one, without a base: what they add to each weight, combined, as a LoRA of some rank."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lora_export.adapter_tools.saving import Derived, DType, NewAdapter, Rank, check_rank
from lora_export.adapters import CONFIG, AdapterFile, read_adapter
from lora_export.adapters.kind import float64
from lora_export.adapters.updates import LowRankUpdate
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import Adapter, AdapterChoice, MergeOptions, TargetUpdate
from lora_export.deltas import spectrum
from lora_export.deltas.spectrum import Spectrum
from lora_export.errors import AdapterError
from lora_export.merging.planning.combine import check_options, combined, largest_rank

_MAYBE_TURNED = ("lora", "adalora", "vblora", "gralora")  # kinds that may be trained on GPT-2's Conv1D


def combine(
    adapters: Sequence[AdapterChoice],
    output: Path,
    options: MergeOptions,
    wanted: Rank | None = None,
    dtype: DType = "float32",
    force: bool = False,
) -> Derived:
    """Write one adapter that does what `options.combine` makes of several.

    Where the sum of LoRAs is asked for and no rank, the result is exact, of the sum of the ranks. What no rank was
    asked for and has none (TIES on deltas, say) gets the largest rank of the adapters. AdapterError for adapters
    that are no deltas without a base (DoRA, OFT, IA3), and for whole tensors.
    """
    wanted = wanted or Rank(options.svd_rank)
    check_rank(wanted, needed=False)
    options = replace(options, svd_rank=None)
    check_options(options)
    sources = [_read(choice, options) for choice in adapters]
    new = NewAdapter(
        f"combine {options.combine}", sources[0].config, changes={"modules_to_save": None, "bias": "none"}
    )
    as_one(new, sources, options, wanted)
    return new.write(output, dtype, force, [a.folder for a in sources])


def as_one(new: NewAdapter, sources: Sequence[Adapter], options: MergeOptions, wanted: Rank) -> None:
    """What the adapters make of each weight together, added to `new`. AdapterError for what is no delta."""
    targets: dict[str, list[TargetUpdate]] = {}
    for owner, adapter in enumerate(sources):
        for update in adapter.updates:
            _check(adapter, update)
            targets.setdefault(update.target, []).append(replace(update, owner=owner))
    for target, updates in targets.items():
        (update,) = combined(target, updates, sources, options)
        delta, largest = _spectrum(update, _turned(updates[0], sources[0]))
        rank = wanted if wanted.asked else Rank(_default_rank(update, sources, options, largest))
        new.add(target.removesuffix(".weight"), delta, rank.of(delta), "embedding" in updates[0].kind)


def _read(choice: AdapterChoice, options: MergeOptions) -> Adapter:
    config, tensors = open_adapter_files(choice.folder)
    file = AdapterFile(
        tensors, config, choice.folder / CONFIG, 1.0, options.expert_packing, options.expert_layout,
        allow_nonfinite=options.allow_nonfinite,
    )  # fmt: skip
    return replace(read_adapter(file), weight=choice.weight)


def _check(adapter: Adapter, update: TargetUpdate) -> None:
    known = None not in update.shapes[0]
    if update.adds and known and len(update.shapes[0]) == 2 and update.kind != "lora_bias":
        return
    if update.adds and not known:
        why = f"the size of the weight that {update.kind} is for follows from the base"
    elif update.adds:
        why = f"{update.kind} is not a matrix that LoRA can represent"
    else:
        why = f"{update.kind} is not a delta unless the base's weight is known"
    raise AdapterError(
        why,
        where=adapter.folder,
        tensor=update.target,
        expected="adapters that add a matrix: LoRA, AdaLoRA, LoHa, LoKr, VB-LoRA, C3A, DeLoRA, GraLoRA",
        next_step="merge them with --combine, and lora-export extract -b BASE -m MERGED makes an adapter of it",
    )


def _spectrum(update: TargetUpdate, turned: bool) -> tuple[Spectrum, int]:
    """The combined delta, (outputs, inputs), or (rows, width) of an embedding; and the rank that it has."""
    shape = tuple(n or 0 for n in update.shapes[0])
    with float64():
        loaded = update.load(shape)
    if isinstance(loaded, LowRankUpdate):
        low = loaded.low_rank.double()
        left, right = (low.right.T, low.left.T) if turned else (low.left, low.right)
        return spectrum.of_factors(low.scaling * left, right), len(low.right)
    delta: torch.Tensor = loaded.apply(torch.zeros(shape, dtype=torch.float64), slice(0, shape[0]))
    return spectrum.of_matrix(delta.T if turned else delta), min(shape)


def _turned(update: TargetUpdate, adapter: Adapter) -> bool:
    """Whether a square weight is taken as stored (inputs, outputs), as its configuration says (GPT-2)."""
    square = len(update.shapes) == 2 and update.shapes[0] == update.shapes[1]
    return square and update.kind in _MAYBE_TURNED and bool(adapter.config.get("fan_in_fan_out"))


def _default_rank(update: TargetUpdate, adapters: Sequence[Adapter], options: MergeOptions, has: int) -> int:
    """All of a low-rank sum; of anything else as much as the largest of the adapters has."""
    if options.combine != "svd" and has < min(n or 0 for n in update.shapes[0]):
        return has
    return largest_rank(adapters) or has
