"""What exports in lower precision leave of the adapter, and the smallest one that keeps it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_export.contracts import AdapterSurvival, Check, ExportedPair, Perplexity
from lora_export.validation.effect.advice import Measured, precision_advice


@dataclass(frozen=True)
class SurvivalFound:
    checks: tuple[Check, ...]
    perplexities: tuple[Perplexity, ...]
    adapter_survival: tuple[AdapterSurvival, ...]
    advice: tuple[str, ...]


def adapter_survival(exports: Sequence[tuple[ExportedPair, Any]], least: float, again: str) -> SurvivalFound:
    """exports: each with what its graphs leave of the adapter's effect (effect.Effect or OutputEffect); least: the
    share that has to be kept; again: the command that tries another precision, with {precision} in it."""
    checks: list[Check] = []
    perplexities: list[Perplexity] = []
    survivals: list[AdapterSurvival] = []
    measured: list[Measured] = []
    for export, found in exports:
        survivals.append(found.survival(export.name))
        perplexities += found.perplexities(_names(export, first=not perplexities))
        share = found.share
        if share is not None:
            check = _check(export, share, found.uncertainty, least)
            checks.append(check)
            measured.append(Measured(export.precision, export.nbytes, share, check.passed))
    advice = precision_advice(measured, least, again)
    return SurvivalFound(tuple(checks), tuple(perplexities), tuple(survivals), advice)


def _names(export: ExportedPair, first: bool) -> list[tuple[str, str]]:
    in_fp32 = [("B", "base"), ("M", "unmerged")] if first else []
    return [*in_fp32, ("BQ", f"{export.name} base"), ("Q", export.name)]


def _check(export: ExportedPair, share: float, uncertainty: float, least: float) -> Check:
    error = "" if math.isnan(uncertainty) else f", ± {uncertainty:.2g} between the texts"
    return Check(
        f"{export.prefix}adapter_survival",
        share,
        least,
        share >= least > 0,
        f"share of the adapter's effect on the outputs that {export.precision} keeps{error}",
    )
