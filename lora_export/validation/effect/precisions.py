"""What exports in lower precision leave of the adapter, which of them to ship, and what made one lose it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.contracts import AdapterSurvival, Check, ExportedPair, Perplexity, ValidationResult
from lora_export.validation.effect.advice import Export, Merged, precision_advice
from lora_export.validation.effect.effect import AnyEffect

# What these compare is the same in any precision: if one of them fails, the export is at fault.
_FAULTS = ("graph", "padded", "weight_errors", "base_graph", "base_padded", "base_weight_errors")


@dataclass(frozen=True)
class JudgedExport:
    """checks: of the export; effect: what its graphs leave of the adapter's; by_weights: the share of it that their
    numbers keep when PyTorch computes with them, None where that is not known."""

    pair: ExportedPair
    checks: tuple[Check, ...]
    effect: AnyEffect
    by_weights: float | None = None

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
            check = _check(pair, share, export.effect.uncertainty, least)
            checks.append(check)
            measured.append(
                Export(
                    pair.precision,
                    pair.nbytes,
                    share,
                    check.passed,
                    export.by_weights,
                    export.faults,
                    pair.activations != "float",
                )
            )
    advice = precision_advice(measured, merged, least, again)
    return ValidationResult(
        tuple(checks), perplexities=tuple(perplexities), adapter_survival=tuple(survivals), advice=advice
    )


def _names(export: ExportedPair, first: bool) -> list[tuple[str, str]]:
    in_fp32 = [("B", "base"), ("M", "unmerged")] if first else []
    return [*in_fp32, ("BQ", f"{export.name} base"), ("Q", export.name)]


def _check(export: ExportedPair, share: float, uncertainty: float, least: float) -> Check:
    """least: 0 accepts any share, so the check has no threshold: only a share that is not a number fails."""
    error = "" if math.isnan(uncertainty) else f", ± {uncertainty:.2g} between the texts"
    return Check(
        f"{export.prefix}adapter_survival",
        share,
        least or None,
        share >= least if least else math.isfinite(share),
        f"share of the adapter's effect on the outputs that {export.precision} keeps{error}",
    )
