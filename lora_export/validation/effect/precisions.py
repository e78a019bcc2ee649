"""What exports in lower precision leave of the adapter, which of them to ship, and what made one lose it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.contracts import AdapterSurvival, Check, ExportedPair, Perplexity, ValidationResult
from lora_export.validation.comparing.thresholds import below, reported
from lora_export.validation.effect.advice import ALIKE, Export, Merged, precision_advice
from lora_export.validation.effect.effect import AnyEffect, Fidelity

# What these compare is the same in any precision: if one of them fails, the export is at fault.
_OF_GRAPHS = ("graph", "padded", "weight_errors", "quantization_errors")
_FAULTS = (*_OF_GRAPHS, *(f"base_{name}" for name in _OF_GRAPHS))


# KL(merged ‖ export) is by how much the perplexity grows, in its logarithm, on text that the merged model writes. A
# hundredth is not worth a decision, however little the adapter does.
LEAST_KL = math.log1p(ALIKE)
OF_BASE = 1.5  # what quantizing the base loses, which whoever chose the precision has accepted


@dataclass(frozen=True)
class JudgedExport:
    """checks: of the export; effect: what its graphs leave of the adapter's; by_weights: the share of it that their
    numbers keep when PyTorch computes with them, None where that is not known; calibrated: whether weights were
    quantized on texts."""

    pair: ExportedPair
    checks: tuple[Check, ...]
    effect: AnyEffect
    by_weights: float | None = None
    calibrated: bool = False

    @property
    def faults(self) -> tuple[str, ...]:
        failed = (c.name for c in self.checks if not c.passed)
        return tuple(n for n in failed if n.removeprefix(self.pair.prefix).startswith(_FAULTS))


def adapter_survival(exports: Sequence[JudgedExport], least: float, again: str, merged: Merged) -> ValidationResult:
    """The checks of what exports keep, and advice. least: the share that has to be kept; again: the command that
    tries another precision, with {precision} in it; merged: what the weights kept before the exports."""
    checks: list[Check] = []
    perplexities: list[Perplexity] = []
    survivals: list[AdapterSurvival] = []
    measured: list[Export] = []
    for export in exports:
        pair, share = export.pair, export.effect.share
        survivals.append(export.effect.survival(pair.name))
        perplexities += export.effect.perplexities(_names(pair, first=not perplexities))
        if share is not None:
            own = [_check(pair, share, export.effect.uncertainty, least)]
            far = export.effect.fidelity
            if far is not None:
                own.append(_kl_check(pair, far, gated=least > 0))
            checks += own
            measured.append(_as_export(export, share, far, own))
    advice = precision_advice(measured, merged, least, again)
    return ValidationResult(
        tuple(checks), perplexities=tuple(perplexities), adapter_survival=tuple(survivals), advice=advice
    )


def _as_export(export: JudgedExport, share: float, far: Fidelity | None, checks: Sequence[Check]) -> Export:
    only_far = far is not None and checks[0].passed and not checks[-1].passed
    return Export(
        export.pair.precision,
        export.pair.nbytes,
        share,
        all(c.passed for c in checks),
        export.by_weights,
        export.faults,
        export.pair.activations != "float",
        None if far is None else far.lost,
        kl_limit(far) if far is not None and only_far else None,
        export.calibrated,
    )


def _names(export: ExportedPair, first: bool) -> list[tuple[str, str]]:
    in_fp32 = [("B", "base"), ("M", "unmerged")] if first else []
    return [*in_fp32, ("BQ", f"{export.name} base"), ("Q", export.name)]


def _check(export: ExportedPair, share: float, uncertainty: float, least: float) -> Check:
    """least: 0 accepts any share, so the check has no threshold: only a share that is not a number fails."""
    return Check(
        f"{export.prefix}adapter_survival",
        share,
        least or None,
        share >= least if least else math.isfinite(share),
        f"share of the adapter's effect on the outputs that {export.precision} keeps{_between(uncertainty)}",
    )


def _kl_check(export: ExportedPair, far: Fidelity, gated: bool) -> Check:
    """An export that is farther from the merged model than the adapter moved it, and than this precision moves the
    base, has lost what no format explains, whatever share of the adapter's direction it keeps."""
    name = f"{export.prefix}kl"
    note = f"mean KL(merged ‖ {export.precision}) in nats{_between(far.error)}"
    if not gated:
        return reported(name, far.lost, note)
    reason = f"the adapter's effect {far.effect:.2g}, {OF_BASE:g} × what the base loses {far.of_base:.2g}"
    return below(name, far.lost, kl_limit(far), f"{note}; the largest of: {reason}, {LEAST_KL:.2g}")


def kl_limit(far: Fidelity) -> float:
    """How far an export may be from the merged model, in nats."""
    return max(far.effect, OF_BASE * far.of_base, LEAST_KL)


def _between(uncertainty: float) -> str:
    return "" if math.isnan(uncertainty) else f", ± {uncertainty:.2g} between the texts"
