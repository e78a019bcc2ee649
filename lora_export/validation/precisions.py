"""What exports in lower precision leave of the adapter, and the smallest one that keeps it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.contracts import AdapterSurvival, Check, ExportedPair, Perplexity, Progress
from lora_export.validation import effect
from lora_export.validation.advice import Measured, precision_advice


@dataclass(frozen=True)
class SurvivalFound:
    checks: tuple[Check, ...]
    perplexities: tuple[Perplexity, ...]
    adapter_survival: tuple[AdapterSurvival, ...]
    advice: tuple[str, ...]


def adapter_survival(
    unmerged: Any,
    exports: Sequence[ExportedPair],
    windows: Sequence[torch.Tensor],
    provider: str,
    least: float,
    again: str,
    progress: Progress,
) -> SurvivalFound:
    """unmerged: PEFT's model in fp32; windows: (length,) ids each; least: the share that has to be kept.

    again: the command that tries another precision, with {precision} where that stands in it.
    """
    checks: list[Check] = []
    perplexities: list[Perplexity] = []
    survivals: list[AdapterSurvival] = []
    measured: list[Measured] = []
    for export in exports:
        progress.stage(f"validate: what {export.precision} leaves of the adapter's effect")
        found = _measure(unmerged, export, windows, provider)
        survivals.append(found.survival(export.name))
        perplexities += found.perplexities(_names(export, first=not perplexities))
        share = found.share
        if share is not None:
            check = _check(export, share, found.uncertainty, least)
            checks.append(check)
            measured.append(Measured(export.precision, export.nbytes, share, check.passed))
    advice = precision_advice(measured, least, again)
    return SurvivalFound(tuple(checks), tuple(perplexities), tuple(survivals), advice)


def _measure(unmerged: Any, export: ExportedPair, windows: Sequence[torch.Tensor], provider: str) -> effect.Effect:
    from lora_export.validation.onnx_decoder import OnnxDecoder

    base = OnnxDecoder(export.base_graphs[0], provider)
    model = OnnxDecoder(export.merged_graphs[0], provider)
    models = (effect.without_adapter(unmerged), effect.of(unmerged), base.logits, model.logits)
    found = effect.Effect()
    for ids in windows:
        found.add(ids, *(logits_of(ids) for logits_of in models))
    return found


def _names(export: ExportedPair, first: bool) -> list[tuple[str, str]]:
    in_fp32 = [("B", "base"), ("M", "unmerged")] if first else []
    return [*in_fp32, ("BQ", f"{export.name} base"), ("Q", export.name)]


def _check(export: ExportedPair, share: float, uncertainty: float, least: float) -> Check:
    error = "" if math.isnan(uncertainty) else f", ± {uncertainty:.2g} between the texts"
    return Check(
        f"{export.prefix}adapter_survival",
        share,
        least,
        share >= least,
        f"share of the adapter's effect on the outputs that {export.precision} keeps{error}",
    )
