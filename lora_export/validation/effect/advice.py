"""Measured figures turned into sentences for a person who has to decide what to ship."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_export.choices import Requantization
from lora_export.contracts import AdapterSurvival, BaseComparison

ALIKE = 0.01  # a relative difference of perplexities that is not worth a decision
KEEPS = 0.9  # of an adapter's effect: below, putting weights back into few bits is advised against


def bases_advice(
    bases: Mapping[str, BaseComparison],
    untrained: Mapping[str, float],
    kept: AdapterSurvival | None,
    method: Requantization | None,
    merged_faithfully: bool,
) -> tuple[str, ...]:
    """bases: by name; untrained: perplexity of "base dequantized" (and "base original").

    kept: of the adapter in the merged weights put back into `method`; merged_faithfully: whether the merged folder
    is the dequantized merge.
    """
    sentences = [_which(bases, merged_faithfully)]
    if bases["trained"].perplexity >= untrained["base dequantized"]:
        sentences.append(
            f"The training gained nothing on this text (perplexity {bases['trained'].perplexity:.2f}, without the "
            f"adapter {untrained['base dequantized']:.2f}): compare on text of the kind it was trained on."
        )
    if method is not None and "requantized" in bases:
        sentences.append(_back(bases, untrained, kept, method))
    return tuple(sentences)


def _which(bases: Mapping[str, BaseComparison], merged_faithfully: bool) -> str:
    faithful = bases["dequantized"]
    ship = "Ship the dequantized merge" if merged_faithfully else "Merge again without --base-weights original"
    text = f"{ship}: it is the function that was trained (mean KL from it {faithful.kl_trained:.1e} nats"
    text += f", perplexity {faithful.perplexity:.2f})."
    if "original" not in bases:
        return f"{text} The original 16-bit base was not measured: pass it with --original-base."
    original = bases["original"]
    change = original.perplexity / faithful.perplexity - 1
    other = f"the original base has perplexity {original.perplexity:.2f}, {_by(change)} on this text"
    if change < -ALIKE:
        return (
            f"{text} The merge into {other}, but it is not the function that was trained (mean KL "
            f"{original.kl_trained:.1e} nats): ship it only after you have evaluated it as the training was."
        )
    return f"{text} The merge into {other}, and is another function (mean KL {original.kl_trained:.1e} nats)."


def _by(change: float) -> str:
    if abs(change) <= ALIKE:
        return "the same within 1 %"
    return f"{abs(change):.0%} {'better' if change < 0 else 'worse'}"


def _back(
    bases: Mapping[str, BaseComparison],
    untrained: Mapping[str, float],
    kept: AdapterSurvival | None,
    method: str,
) -> str:
    """Whether the merged weights may be put back into few bits."""
    merged, back = bases["dequantized"].perplexity, bases["requantized"].perplexity
    before = untrained["base dequantized"]
    figures = f"perplexity {back:.2f}; merged {merged:.2f}, without the adapter {before:.2f}"
    share = 1.0 if kept is None or kept.share is None else kept.share
    lost = [f"{_percent(1 - share)} of the adapter's effect on the outputs"]
    if merged < before:
        gain = math.log(before / back) / math.log(before / merged)
        share = min(share, gain)
        lost.append(f"{_percent(1 - gain)} of what the training gained on this text")
    name = method.upper()
    if share >= KEEPS:
        return f"Putting it back into {name} keeps the adapter: that loses {' and '.join(lost)} ({figures})."
    return (
        f"Do not put it back into {name}: that loses {' and '.join(lost)} ({figures}). To serve in 4 or 8 bits, "
        "load the quantized base and keep the adapter unmerged."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# --- which precision, and what made an export lose the adapter --------------------------------------------------

PART = 1 / 3
LARGER: Mapping[str, str] = {"int4": "int8", "int8": "fp16", "nf4": "fp16", "fp16": "fp32", "bf16": "fp32"}
Cause = Literal["rounding", "merge", "export", "inputs", "weights", "arithmetic", "unknown"]


@dataclass(frozen=True)
class Merged:
    """The merged weights, before any export.

    narrow: the type that they were rounded to, None for float32; kept: the share of the adapter's effect that they
    keep in PyTorch, None where that was not measured; survival: the share of its change to the weights, as the
    merge's certificate states it; faults: failed checks that rounding does not explain.
    """

    narrow: str | None = None
    kept: float | None = None
    survival: float | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Export:
    """nbytes: size of its files; share: what it keeps of the adapter's effect, and whether that is enough;
    by_weights: what its weights alone keep in PyTorch, None where that is not known; faults: failed checks that
    no precision explains; eight_bit_inputs: its products take inputs of 8 bits, too; kl: from the merged model, in
    nats, None where there is none; kl_limit: what was allowed, if this alone is too far; calibrated: on texts."""

    precision: str
    nbytes: int
    share: float
    passed: bool
    by_weights: float | None = None
    faults: tuple[str, ...] = ()
    eight_bit_inputs: bool = False
    kl: float | None = None
    kl_limit: float | None = None
    calibrated: bool = False


def precision_advice(exports: Sequence[Export], merged: Merged, least: float, again: str) -> tuple[str, ...]:
    """least: the share to be kept; again: the command that tries another precision, with {precision} in it."""
    if not exports:
        return ()
    figures = ", ".join(
        f"{e.precision} {e.share:.1%}{'' if e.kl is None else f', KL {e.kl:.2g},'} in {e.nbytes / 1e6:,.0f} MB"
        for e in exports
    )
    passing = sorted((e for e in exports if e.passed), key=lambda e: e.nbytes)
    if passing:
        best = passing[0]
        which = "keeps" if len(exports) == 1 else "is the smallest of those measured that keeps"
        return (f"Ship the {best.precision} export: it {which} the adapter's effect (kept: {figures}).",)
    largest = max(exports, key=lambda e: e.nbytes)
    lost = f"Do not ship {' or '.join(e.precision for e in exports)}: {_lost(exports, least)}"
    return (f"{lost} (kept: {figures}). {_remedy(largest, merged, again)}",)


def _lost(exports: Sequence[Export], least: float) -> str:
    if any(e.kl_limit is None for e in exports):
        return f"less than {least:.0%} of the adapter's effect is left"
    allowed = max(e.kl_limit for e in exports if e.kl_limit is not None)
    return f"the outputs are farther from the merged model's than the precision explains (KL above {allowed:.2g})"


def cause(export: Export, merged: Merged) -> Cause:
    """What an export lost the adapter to: the first stage, from the merge to the graph, that loses PART of all that
    is lost."""
    if export.kl_limit is not None:
        return "export" if export.faults else "weights" if export.precision in LARGER else "unknown"
    kept = 1.0 if merged.kept is None else merged.kept
    by_weights = export.share if export.by_weights is None else export.by_weights
    losses = {"merge": 1 - kept, "weights": kept - by_weights, "arithmetic": by_weights - export.share}
    stage = next((s for s, loss in losses.items() if loss >= PART * (1 - export.share)), "arithmetic")
    # The weights of an fp32 graph are the merged ones, which no stage in between has changed.
    if stage == "merge" or (stage == "weights" and export.precision == "fp32" and not export.faults):
        return "merge" if merged.faults else "rounding" if merged.narrow else "unknown"
    if export.faults:
        return "export"
    if export.eight_bit_inputs and (stage == "arithmetic" or export.by_weights is None):
        return "inputs"
    if export.precision not in LARGER:
        return "unknown"
    return "weights" if stage == "weights" else "arithmetic"


_MIXED = "merge-and-export with --min-survival gives more bits to as few weights as that takes. "


def _remedy(export: Export, merged: Merged, again: str) -> str:
    """The cause and the option to change, in a sentence each."""
    reason = cause(export, merged)
    if reason == "rounding":
        shares = [(merged.survival, "change to the weights"), (merged.kept, "effect on the outputs")]
        left = " and ".join(f"{share:.1%} of its {of}" for share, of in shares if share is not None)
        figures = f", which leaves {left}" if left else ""
        return (
            f"The adapter is lost when the merged weights are rounded to {merged.narrow}{figures}. Merge with "
            "--dtype float32."
        )
    if reason == "merge":
        return f"The adapter is lost in the merge: {merged.faults[0]} fails. Merge again from the same folders."
    if reason == "export":
        return (
            f"The adapter is lost in the export: {export.faults[0]} fails, which no precision explains. Export "
            "again; if the check still fails, try another --engine."
        )
    if reason == "inputs":
        if export.by_weights is None:
            return "The adapter is lost to weights and inputs in 8 bits. Export with --activations float."
        return (
            f"The adapter is lost to inputs in 8 bits: the weights alone keep {export.by_weights:.1%}. Export with "
            "--activations float."
        )
    if reason == "unknown":
        return "See which check of the merge or the export fails."
    what = "weights" if reason == "weights" else "arithmetic"
    command = again.replace("{precision}", LARGER[export.precision])
    calibrate = "Round them so that the outputs change least: --quantizer gptq. "
    more = calibrate if reason == "weights" and export.precision == "int4" and not export.calibrated else ""
    lost = "The adapter is lost to" if export.kl_limit is None else "The difference comes from"
    mixed = "" if reason != "weights" or export.precision not in ("int4", "int8") else _MIXED
    return f"{lost} {what} in {export.precision}. {more}{mixed}Try the next larger precision: {command}"
