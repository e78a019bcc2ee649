"""The figures of each weight that an adapter changes: sizes, singular values, ranks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from lora_export.adapters import AdapterFile, lora
from lora_export.adapters.config import match_pattern
from lora_export.adapters.kind import float64
from lora_export.adapters.updates import LowRank, low_rank_of
from lora_export.contracts import Adapter, ModuleFigures, TargetUpdate, Truncation, TypeFigures
from lora_export.deltas import spectrum
from lora_export.deltas.spectrum import Spectrum
from lora_export.merging import MergePlan
from lora_export.merging.running.rows import change_of, load_updates, whole_base

LISTED = 256  # singular values of a module that are kept: an adapter has fewer, a matrix may have thousands
KEPT = 0.99  # of ‖ΔW‖², at which a rank counts as enough


def by_layer(module: ModuleFigures) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.name.split(".")]


def alone(file: AdapterFile, adapter: Adapter, skipped: dict[str, str]) -> Iterator[ModuleFigures]:
    """From the adapter's own matrices."""
    for update in adapter.updates:
        shape, note = update.shapes[0], ""
        with float64():
            if update.kind == "dora":
                low, note = lora.factors(file, update.target), "of B·A, before the magnitudes"
                values = spectrum_of(low)
            elif update.low_rank and None not in shape:
                low = low_rank_of(update.load(tuple(n or 0 for n in shape)))
                values = spectrum_of(low)
            elif update.adds and len(shape) == 2 and None not in shape:
                known = tuple(n or 0 for n in shape)
                zeros = torch.zeros(known, dtype=torch.float64)
                low, values = None, spectrum.of_matrix(update.load(known).apply(zeros, slice(0, known[0])))
            else:
                skipped[update.target] = f"{update.kind}: {_why_skipped(update)}"
                continue
        yield figures_of(update, file, values, low, None, note)


def _why_skipped(update: TargetUpdate) -> str:
    if update.replaces or update.kind == "trainable_tokens":
        return "it replaces numbers of the base, and -b BASE is needed to tell by how much"
    if update.adds and None in update.shapes[0]:
        return "the adapter does not tell the size of the weight: give -b BASE"
    return "it is not a matrix" if update.adds else "its change depends on the base's weight: give -b BASE"


def with_base(planned: MergePlan, file: AdapterFile) -> Iterator[ModuleFigures]:
    """From what a merge would change; the norm of each weight beside it."""
    for tensor in planned.tensors.values():
        if (
            not tensor.updates
            or len(tensor.shape) < 2
            or tensor.source is None
            or tensor.source.shape != tensor.shape
        ):
            continue
        before = whole_base(tensor, planned.base)
        update, low = tensor.updates[0], None
        if len(tensor.updates) == 1 and update.low_rank:
            with float64():
                low = low_rank_of(update.load(tensor.shape))
            values = spectrum_of(low)
        else:
            values = _dense(before, load_updates(tensor, wide=True))
        yield figures_of(update, file, values, low, float(before.norm()), "")


def _dense(before: torch.Tensor, updates: Sequence[Any]) -> Spectrum:
    """Of a change of any kind; of experts the matrices one below the other."""
    delta = change_of(updates, before, slice(0, before.shape[0]))
    return spectrum.of_matrix(delta.reshape(-1, delta.shape[-1]) if delta.dim() == 3 else delta.flatten(1))


def spectrum_of(low: LowRank) -> Spectrum:
    """Of factors; of such that hold NaN or infinity, singular values that are NaN."""
    left = low.scaling * low.left
    if not bool(torch.isfinite(left).all() and torch.isfinite(low.right).all()):
        return Spectrum(left, torch.full((len(low.right),), math.nan), low.right)
    return spectrum.of_factors(left, low.right)


def figures_of(
    update: TargetUpdate,
    file: AdapterFile,
    values: Spectrum,
    low: LowRank | None,
    weight_norm: float | None,
    note: str,
) -> ModuleFigures:
    """Of one weight: its update, the adapter, the singular values, the factors if it has such, and ‖W‖."""
    finite = math.isfinite(values.norm)
    energy = values.energy.tolist()
    return ModuleFigures(
        name=update.target,
        kind=update.kind,
        rank=len(low.right) if low is not None else None,
        alpha=_alpha(file, update.target.rpartition(".")[0]),
        scaling=low.scaling if low is not None else None,
        norm=values.norm,
        weight_norm=weight_norm,
        relative=values.norm / weight_norm if weight_norm else None,
        singular_values=tuple(values.sizes[:LISTED].tolist()),
        effective_rank=values.effective_rank,
        stable_rank=values.stable_rank,
        energy=tuple(energy[:LISTED]),
        enough=values.rank_for(KEPT) if finite and values.norm > 0 else 0,
        finite=finite,
        note=note,
    )


def _alpha(file: AdapterFile, module: str) -> float | None:
    """With which alpha the configuration has this module trained; None for kinds without one."""
    config = file.config
    alpha = config.get("lora_alpha", config.get("alpha"))
    patterns = config.get("alpha_pattern")
    own = match_pattern(patterns if isinstance(patterns, dict) else {}, module, alpha)
    return float(own) if isinstance(own, (int, float)) else None


def with_share(module: ModuleFigures, total: float) -> ModuleFigures:
    return replace(module, share=module.norm**2 / total if module.finite and total > 0 else 0.0)


def by_type(modules: Sequence[ModuleFigures]) -> dict[str, TypeFigures]:
    """q_proj, … → how many, their share of ‖ΔW‖², and medians of the rest."""
    types = dict.fromkeys(m.type for m in modules)
    return {name: _of_type([m for m in modules if m.type == name]) for name in types}


def _of_type(modules: Sequence[ModuleFigures]) -> TypeFigures:
    relative = [m.relative for m in modules if m.relative is not None and m.finite]
    return TypeFigures(
        modules=len(modules),
        share=sum(m.share for m in modules),
        norm=median([m.norm for m in modules if m.finite] or [0.0]),
        relative=median(relative) if relative else None,
        effective_rank=median(m.effective_rank for m in modules),
        enough=median(m.enough for m in modules),
    )


def truncation(modules: Sequence[ModuleFigures]) -> Iterator[Truncation]:
    """For some ranks below that of the adapter, and its own."""
    low = [m for m in modules if m.rank and m.finite]
    total, largest = sum(m.norm**2 for m in low), max((m.rank or 0 for m in low), default=0)
    if not total:
        return
    ranks = sorted({r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if r < largest} | {largest})
    for rank in ranks:
        kept = sum(m.norm**2 * m.energy[min(rank, len(m.energy)) - 1] for m in low if m.energy)
        left = sum(min(rank, m.rank or 0) for m in low) / sum(m.rank or 0 for m in low)
        yield Truncation(rank, kept / total, left)
