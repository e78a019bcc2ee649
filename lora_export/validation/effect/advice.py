"""Measured figures turned into sentences for a person who has to decide what to ship."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    said = [_which(bases, merged_faithfully)]
    if bases["trained"].perplexity >= untrained["base dequantized"]:
        said.append(
            f"On this text the training gained nothing (perplexity {bases['trained'].perplexity:.2f}, without the "
            f"adapter {untrained['base dequantized']:.2f}): compare on text of the kind that it was trained on."
        )
    if method is not None and "requantized" in bases:
        said.append(_back(bases, untrained, kept, method))
    return tuple(said)


def _which(bases: Mapping[str, BaseComparison], merged_faithfully: bool) -> str:
    faithful = bases["dequantized"]
    ship = "Ship the dequantized merge" if merged_faithfully else "Merge again without --base-weights original"
    text = f"{ship}: it is the function that was trained (mean KL from it {faithful.kl_trained:.1e} nats"
    text += f", perplexity {faithful.perplexity:.2f})."
    if "original" not in bases:
        return f"{text} How the original 16-bit base would do was not measured: give it with --original-base."
    original = bases["original"]
    change = original.perplexity / faithful.perplexity - 1
    other = f"the original base has perplexity {original.perplexity:.2f}, {_by(change)} on this text"
    if change < -ALIKE:
        return (
            f"{text} The merge into {other}, but it is not the function that was evaluated in training (mean KL "
            f"{original.kl_trained:.1e} nats): ship that one only after evaluating it as the training was."
        )
    return f"{text} The merge into {other}, and another function (mean KL {original.kl_trained:.1e} nats)."


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
        return f"Putting it back into {name} keeps the adapter: lost are {' and '.join(lost)} ({figures})."
    return (
        f"Do not put it back into {name}: lost are {' and '.join(lost)} ({figures}). To serve in 4 or 8 bits, load "
        "the quantized base and keep the adapter unmerged."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# --- which precision ---------------------------------------------------------------------------------------

LARGER: Mapping[str, str] = {"int4": "int8", "int8": "fp16", "fp16": "fp32", "bf16": "fp32"}


@dataclass(frozen=True)
class Measured:
    """An export: its precision, the size of its files in bytes, what it keeps of the adapter, and whether that is
    enough."""

    precision: str
    nbytes: int
    share: float
    passed: bool


def precision_advice(measured: Sequence[Measured], least: float, again: str) -> tuple[str, ...]:
    """again: the command that tries another precision, with {precision} in it."""
    if not measured:
        return ()
    figures = ", ".join(f"{m.precision} {m.share:.1%} in {m.nbytes / 1e6:,.0f} MB" for m in measured)
    passing = sorted((m for m in measured if m.passed), key=lambda m: m.nbytes)
    if passing:
        best = passing[0]
        which = "keeps" if len(measured) == 1 else "is the smallest of those measured that keeps"
        return (f"Ship the {best.precision} export: it {which} the adapter's effect (kept: {figures}).",)
    largest = max(measured, key=lambda m: m.nbytes).precision
    lost = (
        f"Do not ship {' or '.join(m.precision for m in measured)}: less than {least:.0%} of the adapter's effect"
    )
    if largest not in LARGER:
        return (f"{lost} is left even so (kept: {figures}). See which check of the merge or the export fails.",)
    command = again.replace("{precision}", LARGER[largest])
    return (f"{lost} is left (kept: {figures}). Try the next larger precision: {command}",)
