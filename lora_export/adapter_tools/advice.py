"""What the figures of an adapter mean, in sentences: was the rank right, who did the work, is anything wrong?"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median
from typing import Any

from lora_export.adapter_tools.spectrum import KEPT, by_type
from lora_export.adapters import AdapterFile
from lora_export.adapters.config import match_pattern
from lora_export.contracts import ModuleFigures, Truncation

ROOMY = 0.5  # of the trained rank: where less is enough, a smaller one would have done
FLAT = 0.5  # of an even share: where the last singular value has more, no direction was spare
HARDLY = 1e-3  # of the median norm of such modules: hardly trained
HUGE = 1.0  # of ‖W‖
USUAL_SCALING = (1 / 16, 16.0)


def sentences(modules: Sequence[ModuleFigures], truncation: Sequence[Truncation]) -> Iterator[str]:
    alive = [m for m in modules if m.norm > 0 and m.finite]
    if not alive:
        yield "The adapter changes nothing: every delta is zero."
        return
    yield _size(alive)
    yield _work(alive)
    if any(m.rank for m in alive):
        yield _rank(alive)
        half = [t for t in truncation[:-1] if t.parameters <= 0.5]
        if half:
            rank, kept = half[-1].rank, half[-1].energy_kept
            yield f"Cut to rank {rank}, it would keep {kept:.2%} of ‖ΔW‖² (lose {(1 - kept) ** 0.5:.1%} of ‖ΔW‖)."


def _size(alive: Sequence[ModuleFigures]) -> str:
    relative = [m.relative for m in alive if m.relative is not None]
    if not relative:
        norms = [m.norm for m in alive]
        return (
            f"{len(alive)} weights change, ‖ΔW‖ from {min(norms):.3g} to {max(norms):.3g} (-b relates it to ‖W‖)."
        )
    return (
        f"{len(alive)} weights change, by {median(relative):.2%} of their norm in the median, "
        f"{min(relative):.2%} to {max(relative):.2%}."
    )


def _work(alive: Sequence[ModuleFigures]) -> str:
    """Which modules and which layers did it."""
    types = sorted(by_type(alive).items(), key=lambda t: -t[1].share)
    largest = ", ".join(f"{name} has {figures.share:.0%}" for name, figures in types[:4])
    rest = f" and {len(types) - 4} more" if len(types) > 4 else ""
    most = max(alive, key=lambda m: m.share)
    name = most.name.removesuffix(".weight")
    return f"Of ‖ΔW‖², {largest}{rest}; most is in {name} ({most.share:.1%})."


def _rank(alive: Sequence[ModuleFigures]) -> str:
    """Whether the rank was too large, too small, or right."""
    low = [m for m in alive if m.rank]
    trained, enough = median(m.rank or 0 for m in low), median(m.enough for m in low)
    effective = mean(m.effective_rank for m in low)
    figures = (
        f"the effective rank is {effective:.1f} on average, and {KEPT:.0%} of ‖ΔW‖² need {enough:g} in the median"
    )
    last = median((_last(m) / m.norm) ** 2 * (m.rank or 1) for m in low)
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


def _last(module: ModuleFigures) -> float:
    """The singular value at the trained rank, which may be larger than the matrix, or than the list is long."""
    known = module.singular_values
    return known[min(module.rank or 1, len(known)) - 1]


def trouble(modules: Sequence[ModuleFigures]) -> Iterator[str]:
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
            "the learning rate or alpha was too large, or this is the wrong base"
        )


def config_trouble(modules: Sequence[ModuleFigures], config: Mapping[str, Any], file: AdapterFile) -> Iterator[str]:
    """Mistakes with alpha and with patterns that match no module."""
    scalings = [
        m.scaling for m in modules if m.scaling is not None and m.kind.startswith(("lora", "dora", "adalora"))
    ]
    if scalings and not USUAL_SCALING[0] <= abs(median(scalings)) <= USUAL_SCALING[1]:
        how = "alpha/√rank" if config.get("use_rslora") else "alpha/rank"
        yield (
            f"the scaling {how} is {median(scalings):g}, {USUAL_SCALING[0]:g} to {USUAL_SCALING[1]:g} are usual: "
            "is lora_alpha the value used in training?"
        )
    if file.config.get("peft_type") == "ADALORA":
        return
    for key in ("rank_pattern", "alpha_pattern"):
        for expression in config.get(key) or {}:
            names = (m.name.rpartition(".")[0] for m in modules)
            if all(match_pattern({expression: 1}, name, None) is None for name in names):
                yield f"{key} has the key {expression!r}, which matches no module of this adapter"
