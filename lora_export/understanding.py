"""What an adapter has learnt, from its numbers: the sizes and singular values of its deltas, and what they mean."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from lora_export.adapters import CONFIG, AdapterFile, lora, read_adapter
from lora_export.adapters.config import match_pattern, parse_lora
from lora_export.adapters.kind import float64
from lora_export.adapters.spelling import respelled
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import Adapter, AdapterChoice, MergeOptions, Progress, TargetUpdate
from lora_export.deltas import spectrum
from lora_export.deltas.spectrum import Spectrum
from lora_export.documents import finite
from lora_export.errors import InputError
from lora_export.merge import MergePlan, plan
from lora_export.merge.exact import base_rows, load_updates
from lora_export.progress import Silent

if TYPE_CHECKING:
    import torch

LISTED = 256  # singular values of a module that are kept: an adapter has fewer, a matrix may have thousands
KEPT = 0.99  # of ‖ΔW‖², at which a rank counts as enough
ROOMY = 0.5  # of the trained rank: where less is enough, a smaller one would have done
FLAT = 0.5  # of an even share: where the last singular value has more, no direction was spare
HARDLY = 1e-3  # of the median norm of such modules: hardly trained
SHARE_OF_MODULE = 0.8  # of the modules, for a sentence about the adapter
HUGE = 1.0  # of ‖W‖
USUAL_SCALING = (1 / 16, 16.0)


@dataclass(frozen=True)
class Module:
    """One weight that the adapter changes. norm: ‖ΔW‖ (Frobenius); relative: ‖ΔW‖/‖W‖, with a base alone.

    rank: that it was trained with (None: the kind has none); singular_values: falling, the first LISTED; energy:
    share of ‖ΔW‖² that the first 1, 2, … have; enough: least rank for KEPT of it; share: of ‖ΔW‖² of the adapter.
    note: what the figures are of, where that is not the whole change. name: as records of a merge have it.
    """

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    norm: float
    weight_norm: float | None
    relative: float | None
    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    energy: tuple[float, ...]
    enough: int
    share: float = 0.0
    finite: bool = True
    note: str = ""

    @property
    def type(self) -> str:
        """q_proj of model.layers.0.self_attn.q_proj.weight."""
        return self.name.rpartition(".")[0].rpartition(".")[2]


@dataclass(frozen=True)
class Understanding:
    """sentences: what the figures say; warnings: signs of trouble; truncation: (rank, share of ‖ΔW‖² that is kept,
    share of the numbers that are left) of all low-rank modules together; skipped: module → why it has no figures.
    """

    adapter: str
    modules: tuple[Module, ...]
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    truncation: tuple[tuple[int, float, float], ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "kind": "adapter",
            "adapter": self.adapter,
            "sentences": list(self.sentences),
            "warnings": list(self.warnings),
            "truncation": [
                {"rank": r, "energy_kept": kept, "parameters": left} for r, kept, left in self.truncation
            ],
            "by_type": by_type(self.modules),
            "modules": [asdict(m) | {"type": m.type} for m in self.modules],
            "skipped": dict(self.skipped),
        }
        known: dict[str, Any] = finite(document)
        return known


def understand(adapter: Path, base: Path | None = None, progress: Progress | None = None) -> Understanding:
    """Read the numbers of an adapter, and of the base's weights that it changes. Raises as a merge would.

    Without a base, kinds whose change depends on the weight have no figures; of DoRA they are of B·A alone.
    """
    progress = progress or Silent()
    config, tensors = open_adapter_files(adapter)
    file = respelled(AdapterFile(tensors, config, adapter / CONFIG, allow_nonfinite=True))
    read, skipped = read_adapter(file), dict[str, str]()
    planned = plan(base, [AdapterChoice(adapter)], MergeOptions(allow_nonfinite=True)) if base else None
    source = _with_base(planned, file) if planned else _alone(file, read, skipped)
    modules = []
    for module in source:
        modules.append(module)
        progress.advance(len(modules), len(read.updates))
    if not modules:
        raise InputError(
            f"the change of this adapter ({', '.join(sorted({u.kind for u in read.updates}))}) depends on the base",
            where=adapter,
            expected="the base beside it",
            next_step=f"lora-export inspect -a {adapter} -b BASE",
        )
    modules.sort(key=_by_layer)
    total = sum(m.norm**2 for m in modules if m.finite)
    shared = tuple(_with_share(m, total) for m in modules)
    truncation = tuple(_truncation(shared, file))
    warnings = (*_trouble(shared), *_config_trouble(shared, config, file))
    return Understanding(
        adapter.resolve().name, shared, tuple(_sentences(shared, truncation)), warnings, truncation, skipped
    )


def _by_layer(module: Module) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.name.split(".")]


# --- figures -----------------------------------------------------------------------------------------------


def _alone(file: AdapterFile, adapter: Adapter, skipped: dict[str, str]) -> Iterator[Module]:
    """From the adapter's own matrices."""
    import torch

    for update in adapter.updates:
        shape, note = update.shapes[0], ""
        with float64():
            if update.kind == "dora":
                config = parse_lora(file.config, file.where)
                module = next(m for m in lora.modules(file, config) if f"{m.name}.weight" == update.target)
                low, note = module.load(module.shapes[0]), "of B·A, before the magnitudes"
                found = _spectrum(low)
            elif update.low_rank and None not in shape:
                low = _low_rank(update, tuple(n or 0 for n in shape))
                found = _spectrum(low)
            elif update.adds and len(shape) == 2 and None not in shape:
                known = tuple(n or 0 for n in shape)
                zeros = torch.zeros(known, dtype=torch.float64)
                low, found = None, spectrum.of_matrix(update.load(known).apply(zeros, slice(0, known[0])))
            else:
                skipped[update.target] = f"{update.kind}: {_why_skipped(update)}"
                continue
        yield _module(update, file, found, low, None, note)


def _why_skipped(update: TargetUpdate) -> str:
    if update.replaces or update.kind == "trainable_tokens":
        return "it replaces numbers of the base, and -b BASE is needed to tell by how much"
    return "it is no matrix" if update.adds else "its change depends on the base's weight: give -b BASE"


def _with_base(planned: MergePlan, file: AdapterFile) -> Iterator[Module]:
    """From what a merge would change; the norm of each weight beside it."""
    for tensor in planned.tensors.values():
        if (
            not tensor.updates
            or len(tensor.shape) < 2
            or tensor.source is None
            or tensor.source.shape != tensor.shape
        ):
            continue
        packed = tensor.quantized.load(planned.base) if tensor.quantized else None
        before = base_rows(tensor, packed, 0, tensor.shape[0]).double()
        update, low = tensor.updates[0], None
        if len(tensor.updates) == 1 and update.low_rank:
            with float64():
                low = _low_rank(update, tensor.shape)
            found = _spectrum(low)
        else:
            found = _dense(before, load_updates(tensor, wide=True))
        yield _module(update, file, found, low, float(before.norm()), "")


def _dense(before: "torch.Tensor", updates: Sequence[Any]) -> Spectrum:
    """Of a change of any kind; of experts the matrices one below the other."""
    after = before.clone()
    for update in updates:
        after = update.apply(after, slice(0, before.shape[0])).reshape(before.shape)
    delta = after - before
    return spectrum.of_matrix(delta.reshape(-1, delta.shape[-1]) if delta.dim() == 3 else delta.flatten(1))


def _spectrum(low: lora.LowRank) -> Spectrum:
    """Of factors; of such that hold NaN or infinity, singular values that are NaN."""
    import torch

    left = low.scaling * low.left
    if not bool(torch.isfinite(left).all() and torch.isfinite(low.right).all()):
        return Spectrum(left, torch.full((len(low.right),), math.nan), low.right)
    return spectrum.of_factors(left, low.right)


def _low_rank(update: TargetUpdate, shape: tuple[int, ...]) -> lora.LowRank:
    loaded = update.load(shape)
    assert isinstance(loaded, lora.LowRankUpdate)
    return loaded.low_rank


def _module(
    update: TargetUpdate,
    file: AdapterFile,
    found: Spectrum,
    low: lora.LowRank | None,
    weight_norm: float | None,
    note: str,
) -> Module:
    finite = math.isfinite(found.norm)
    energy = found.energy.tolist()
    return Module(
        name=update.target,
        kind=update.kind,
        rank=len(low.right) if low is not None else None,
        alpha=_alpha(file, update.target.rpartition(".")[0]),
        scaling=low.scaling if low is not None else None,
        norm=found.norm,
        weight_norm=weight_norm,
        relative=found.norm / weight_norm if weight_norm else None,
        singular_values=tuple(found.sizes[:LISTED].tolist()),
        effective_rank=found.effective_rank,
        stable_rank=found.stable_rank,
        energy=tuple(energy[:LISTED]),
        enough=found.rank_for(KEPT) if finite and found.norm > 0 else 0,
        finite=finite,
        note=note,
    )


def _alpha(file: AdapterFile, module: str) -> float | None:
    """With which alpha the configuration has this module trained; None for kinds without one."""
    config = file.config
    alpha = config.get("lora_alpha", config.get("alpha"))
    patterns = config.get("alpha_pattern")
    found = match_pattern(patterns if isinstance(patterns, dict) else {}, module, alpha)
    return float(found) if isinstance(found, (int, float)) else None


def _with_share(module: Module, total: float) -> Module:
    return replace(module, share=module.norm**2 / total if module.finite and total > 0 else 0.0)


def by_type(modules: Sequence[Module]) -> dict[str, dict[str, Any]]:
    """q_proj, … → how many, their share of ‖ΔW‖², and medians of the rest."""
    types = dict.fromkeys(m.type for m in modules)
    return {name: _of_type([m for m in modules if m.type == name]) for name in types}


def _of_type(modules: Sequence[Module]) -> dict[str, Any]:
    relative = [m.relative for m in modules if m.relative is not None and m.finite]
    return {
        "modules": len(modules),
        "share": sum(m.share for m in modules),
        "norm": median([m.norm for m in modules if m.finite] or [0.0]),
        "relative": median(relative) if relative else None,
        "effective_rank": median(m.effective_rank for m in modules),
        "enough": median(m.enough for m in modules),
    }


def _truncation(modules: Sequence[Module], file: AdapterFile) -> Iterator[tuple[int, float, float]]:
    low = [m for m in modules if m.rank and m.finite]
    total, largest = sum(m.norm**2 for m in low), max((m.rank or 0 for m in low), default=0)
    if not total:
        return
    ranks = sorted({r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if r < largest} | {largest})
    for rank in ranks:
        kept = sum(m.norm**2 * m.energy[min(rank, len(m.energy)) - 1] for m in low if m.energy)
        yield rank, kept / total, sum(min(rank, m.rank or 0) for m in low) / sum(m.rank or 0 for m in low)


# --- words -------------------------------------------------------------------------------------------------


def _sentences(modules: Sequence[Module], truncation: Sequence[tuple[int, float, float]]) -> Iterator[str]:
    alive = [m for m in modules if m.norm > 0 and m.finite]
    if not alive:
        yield "The adapter changes nothing: every delta is zero."
        return
    yield _size(alive)
    yield _work(alive)
    if any(m.rank for m in alive):
        yield _rank(alive)
        half = [t for t in truncation[:-1] if t[2] <= 0.5]
        if half:
            rank, kept, _ = half[-1]
            yield f"Cut to rank {rank}, it would keep {kept:.2%} of ‖ΔW‖² (lose {(1 - kept) ** 0.5:.1%} of ‖ΔW‖)."


def _size(alive: Sequence[Module]) -> str:
    relative = [m.relative for m in alive if m.relative is not None]
    if not relative:
        norms = [m.norm for m in alive]
        return f"{len(alive)} weights change, ‖ΔW‖ from {min(norms):.3g} to {max(norms):.3g} (with -b: beside ‖W‖)."
    return (
        f"{len(alive)} weights change, by {median(relative):.2%} of their norm in the median, "
        f"{min(relative):.2%} to {max(relative):.2%}."
    )


def _work(alive: Sequence[Module]) -> str:
    """Which modules and which layers did it."""
    types = sorted(by_type(alive).items(), key=lambda t: -t[1]["share"])
    named = ", ".join(f"{name} has {found['share']:.0%}" for name, found in types[:4])
    rest = f" and {len(types) - 4} more" if len(types) > 4 else ""
    most = max(alive, key=lambda m: m.share)
    name = most.name.removesuffix(".weight")
    return f"Of ‖ΔW‖², {named}{rest}; most is in {name} ({most.share:.1%})."


def _rank(alive: Sequence[Module]) -> str:
    """Whether the rank was too large, too small, or right."""
    low = [m for m in alive if m.rank]
    trained, enough = median(m.rank or 0 for m in low), median(m.enough for m in low)
    effective = mean(m.effective_rank for m in low)
    figures = (
        f"the effective rank is {effective:.1f} on average, and {KEPT:.0%} of ‖ΔW‖² need {enough:g} in the median"
    )
    last = median((m.singular_values[(m.rank or 1) - 1] / m.norm) ** 2 * (m.rank or 1) for m in low)
    if enough <= ROOMY * trained:
        return (
            f"The rank was larger than needed: of {trained:g}, {figures}. `truncate --energy 99%` makes it smaller."
        )
    if last > FLAT:
        return (
            f"The rank may have been too small: of {trained:g}, {figures}, and the last singular value has "
            f"{last:.0%} of an even share. A larger rank may learn more."
        )
    return f"The rank fits: of {trained:g}, {figures}."


def _trouble(modules: Sequence[Module]) -> Iterator[str]:
    """Signs that something went wrong."""
    broken = [m for m in modules if not m.finite]
    if broken:
        yield f"{len(broken)} modules hold NaN or infinity, {broken[0].name} first: this training diverged"
    dead = [m for m in modules if m.norm == 0]
    if len(dead) == len(modules):
        yield "every delta is zero: the adapter was not trained, or saved before it was (B starts at zero)"
    elif dead:
        yield f"{len(dead)} of {len(modules)} modules are dead, their delta is zero: {dead[0].name} first"
    for name in dict.fromkeys(m.type for m in modules):
        alike = [m for m in modules if m.type == name and m.finite and m.norm > 0]
        middle = median([m.norm for m in alike]) if alike else 0.0
        hardly = [m for m in alike if m.norm < HARDLY * middle]
        if hardly:
            yield f"{len(hardly)} {name} changed by less than {HARDLY:g} of the others, {hardly[0].name} first"
    huge = [m for m in modules if m.relative is not None and m.relative > HUGE]
    if huge:
        worst = max(huge, key=lambda m: m.relative or 0)
        yield (
            f"{len(huge)} changes are larger than their weights, {worst.name} by {worst.relative:.1f} times: "
            "the learning rate or alpha was too large, or this is not the base"
        )


def _config_trouble(modules: Sequence[Module], config: Mapping[str, Any], file: AdapterFile) -> Iterator[str]:
    """Mistakes with alpha and with patterns that fit no module."""
    scalings = [
        m.scaling for m in modules if m.scaling is not None and m.kind.startswith(("lora", "dora", "adalora"))
    ]
    if scalings and not USUAL_SCALING[0] <= abs(median(scalings)) <= USUAL_SCALING[1]:
        how = "alpha/√rank" if config.get("use_rslora") else "alpha/rank"
        yield (
            f"the scaling {how} is {median(scalings):g}, {USUAL_SCALING[0]:g} to {USUAL_SCALING[1]:g} are usual: "
            "is lora_alpha that of the training?"
        )
    if file.config.get("peft_type") == "ADALORA":
        return
    for key in ("rank_pattern", "alpha_pattern"):
        for expression in config.get(key) or {}:
            names = (m.name.rpartition(".")[0] for m in modules)
            if all(match_pattern({expression: 1}, name, None) is None for name in names):
                yield f"{key} has the key {expression!r}, which fits no module of this adapter"
