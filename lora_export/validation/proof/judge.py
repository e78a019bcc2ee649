"""Which trials differ too much: relative to the largest value of an output, and to what arithmetic itself does."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_export.validation.proof.trial import Expected, Trial

RELATIVE = 1e-4  # share of an output's largest value in fp32: sums in another order
# How often a measured noise counts: PyTorch keeps norms and softmax in fp32 where a 16-bit graph may round.
TIMES = {"float32": 8.0, "float16": 4.0, "bfloat16": 4.0}
HOPELESS = 0.3  # above it no floor is measured: no arithmetic does that


@dataclass(frozen=True)
class Measured:
    """One output of one trial. difference: relative to its largest value, infinite if it is missing, has another
    shape or a NaN; number: of the trial; allowed: what counts as the same."""

    number: int
    case: str
    graph: str
    output: str
    difference: float
    limit: bool
    note: str = ""
    allowed: float = RELATIVE

    @property
    def passes(self) -> bool:
        return self.difference <= self.allowed

    @property
    def share(self) -> float:
        """Of what is allowed; infinite for no number."""
        share = self.difference / self.allowed
        return float("inf") if math.isnan(share) else share


def difference(expected: Any, found: Any) -> float:
    """The largest difference, relative to the largest value expected; infinite for NaN, or for another shape.

    Negative infinities in the same places, as of tokens that are ruled out, are equal; positive ones are too large.
    """
    wanted = np.asarray(expected, np.float32)
    actual = np.asarray(found).astype(np.float32)
    if wanted.shape != actual.shape:
        return float("inf")
    same = (wanted == actual) & (wanted < np.inf)
    with np.errstate(invalid="ignore"):
        gap = np.where(same, np.float32(0), np.abs(wanted - actual))
        finite = np.where(np.isfinite(wanted), np.abs(wanted), 0)
        share = float(gap.max(initial=0) / max(float(finite.max(initial=0)), 1e-30))
    return float("inf") if math.isnan(share) else share


def measured(trial: Trial, number: int) -> Iterator[Measured]:
    """Each output of a trial; one that says so if there is none to compare."""

    def of(output: str, share: float, note: str = "") -> Measured:
        return Measured(number, trial.case, trial.graph, output, share, trial.limit, note)

    if trial.failure:
        yield of("", float("inf"), f"the graph does not run: {trial.failure[:300]}")
        return
    if not trial.expected:
        yield of("", float("inf"), "none of the graph's outputs is one of the model's")
    for name, expected in trial.expected.items():
        if name not in trial.found:
            yield of(name, float("inf"), "the graph does not have this output")
            continue
        found = trial.found[name]
        note = ""
        if tuple(found.shape) != tuple(expected.shape):
            note = f"shape {list(found.shape)} instead of {list(expected.shape)}"
        yield of(name, difference(expected.numpy(), found), note)


def floors(plain: Sequence[Expected], other: Sequence[Expected]) -> dict[tuple[int, str], float]:
    """How far another arithmetic of PyTorch moves each output: by the trial's number and the output's name."""
    return {
        (number, name): difference(value.numpy(), changed[name].numpy())
        for number, (value_of, changed) in enumerate(zip(plain, other, strict=True))
        for name, value in value_of.items()
        if name in changed
    }


def allowed(noise: float) -> float:
    """What counts as the same where arithmetic makes so much noise; noise that is no number allows nothing."""
    return RELATIVE + min(noise, HOPELESS) if math.isfinite(noise) else RELATIVE


def worst(found: Iterable[Measured]) -> Measured | None:
    return max(found, key=lambda m: m.share, default=None)
