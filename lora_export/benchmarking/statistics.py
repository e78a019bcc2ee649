"""From blocks of timings to a ratio, its interval and a verdict.

Equivalence is two one-sided tests at 5 % (Schuirmann 1987): both reject exactly when the 90 % interval of the
ratio lies inside the margin. Ratios are averaged as logarithms, so that a/b and b/a are judged alike.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_export.choices import Verdict
from lora_export.contracts import Percentile

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.90
MIN_BLOCKS = 15
MIN_SESSIONS = 6  # sets of sessions whose spread gives an interval
TRIM = 0.2
NOT_NUMBERS = "the timings are not numbers"
RESAMPLES = 2000
PERCENTILES = (0.50, 0.95, 0.99)
_PERCENTILE_RESAMPLES = 400
# (z_.95 + z_.95)²: pairs that give a two-sided-test at 5 % a power of 90 % per unit of (σ/δ)².
_POWER_FACTOR = 10.8


@dataclass(frozen=True)
class Interval:
    """A ratio of two latencies with its 90 % interval; se is the standard error of its logarithm."""

    ratio: float
    low: float
    high: float
    se: float

    @property
    def half_width(self) -> float:
        """How far the interval reaches from no difference, as a relative difference."""
        with np.errstate(divide="ignore"):
            return float(np.exp(np.abs(np.log([self.low, self.high])).max()) - 1)


def log_ratios(arm: Array, *references: Array) -> Array:
    """One paired log ratio a block: the arm's median over the references' geometric mean of medians.

    All are (blocks, calls) in one unit of time.
    """
    reference = np.mean([np.log(np.median(r, axis=1)) for r in references], axis=0)
    result: Array = np.log(np.median(arm, axis=1)) - reference
    return result


def trimmed_mean(values: Array, axis: int = -1) -> Array:
    """Mean without the lowest and highest fifth: nearly as efficient, and not moved by a stolen core."""
    from scipy import stats

    return np.asarray(stats.trim_mean(values, TRIM, axis=axis), dtype=np.float64)


def ratio_interval(logs: Array, rng: np.random.Generator, resamples: int = RESAMPLES) -> Interval:
    """Bootstrap the trimmed mean over blocks.

    Neighbouring blocks are correlated, so runs of about n^(1/3) blocks are drawn together (circular
    block bootstrap, Politis and Romano 1992). A percentile interval of few blocks is too short; it is
    stretched by the quantile of Student's t over the normal one.
    """
    centre = float(trimmed_mean(logs))
    n = len(logs)
    if n < 2:
        return Interval(math.exp(centre), 0.0, math.inf, math.inf)
    draws = trimmed_mean(logs[_circular_blocks(n, resamples, rng)])
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    stretch = _small_sample_stretch(n)
    return Interval(
        ratio=math.exp(centre),
        low=math.exp(centre - stretch * (centre - float(low))),
        high=math.exp(centre + stretch * (float(high) - centre)),
        se=stretch * float(draws.std()),
    )


def percentiles(times: Array, rng: np.random.Generator) -> tuple[Percentile, ...]:
    """p50, p95 and p99 of all calls, times being (blocks, calls) in milliseconds, by the percentile bootstrap.

    Blocks are drawn, as for a ratio, and their calls taken together. A p99 of less than a few hundred calls is
    nearly the slowest of them, and its interval says so.
    """
    values = np.quantile(times, PERCENTILES)
    if len(times) < 2:
        return tuple(Percentile(float(v), 0.0, math.inf) for v in values)
    draws = np.stack(
        [np.quantile(times[rows], PERCENTILES) for rows in _circular_blocks(len(times), _PERCENTILE_RESAMPLES, rng)]
    )
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return tuple(Percentile(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True))


def _circular_blocks(n: int, resamples: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    length = max(1, round(n ** (1 / 3)))
    starts = rng.integers(0, n, (resamples, math.ceil(n / length)))
    indices = (starts[:, :, None] + np.arange(length)) % n
    return indices.reshape(resamples, -1)[:, :n]


def _small_sample_stretch(n: int) -> float:
    from scipy import stats

    # A fifth trimmed at each end leaves the degrees of freedom of what is kept (Yuen 1974).
    kept = max(2, n - 2 * int(TRIM * n))
    quantile = (1 + CONFIDENCE) / 2
    ratio = stats.t.ppf(quantile, kept - 1) / stats.norm.ppf(quantile)
    return float(ratio * math.sqrt(n / (n - 1)))


def blocks_needed(interval: Interval, blocks: int, margin: float) -> int:
    """Blocks that show equivalence nine times in ten if there is no difference, from the variance so far."""
    if not math.isfinite(interval.se):
        return MIN_BLOCKS
    sigma = interval.se * math.sqrt(blocks)
    return max(MIN_BLOCKS, math.ceil(_POWER_FACTOR * (sigma / math.log1p(margin)) ** 2))


def judge(
    merged: Interval,
    floor: Interval,
    control: Interval | None,
    blocks: int,
    margin: float,
    name: str = "unmerged",
    sessions: int = 1,
) -> tuple[Verdict, str]:
    """The verdict on one cell, and the reason where it is not the interval alone.

    floor: the base against itself. control: an arm called `name` that does more work than the base, against it.
    """
    noisy = not floor.half_width <= margin
    if 1 < sessions < MIN_SESSIONS:
        return "inconclusive", f"only {sessions} sets of sessions; a spread needs at least {MIN_SESSIONS}"
    if blocks < MIN_BLOCKS:
        return "inconclusive", f"only {blocks} blocks fitted into the time; at least {MIN_BLOCKS} are needed"
    if any(math.isnan(x) for of in (merged, floor) for x in (of.ratio, of.low, of.high)):
        return "inconclusive", NOT_NUMBERS
    if noisy and merged.low > (1 + margin) * (1 + floor.half_width):
        return "slower", ""  # by more than the margin and the floor together
    if noisy:
        return "inconclusive", (
            f"the noise floor ({floor.half_width:.2%}) exceeds the margin ({margin:.2%}): give it more time, a "
            "quieter machine, or more --sessions if it is two sessions of one graph that differ"
        )
    if merged.low > 1 + margin:
        return "slower", ""
    if control is not None and not control.low > 1:
        return "inconclusive", (
            f"the positive control failed: {name} does more work than the base but was not found slower "
            f"(ratio {control.ratio:.4f}, 90 % interval {control.low:.4f}–{control.high:.4f})"
        )
    if 1 / (1 + margin) <= merged.low and merged.high <= 1 + margin:
        return "equivalent", ""
    if merged.high < 1 / (1 + margin):
        return (
            "inconclusive",
            "merged was faster by more than the margin, which merging cannot explain",
        )
    of = f" of {sessions} sets of sessions" if sessions > 1 else ""
    return "inconclusive", f"the interval reaches beyond the margin after {blocks} blocks{of}"


def on_one_graph(found: Verdict, reason: str, margin: float, *, ended_early: bool) -> tuple[Verdict, str]:
    """The verdict where base and merged are one optimized graph, from what `judge` found of the timings.

    The graph shows that merged does the same work, whatever the noise: only timings that are slower, or no numbers,
    say something else. `equivalent` stays where a full measurement passed its test. ended_early: it was a check,
    which tests nothing.
    """
    if found == "slower" or reason == NOT_NUMBERS or (found == "equivalent" and not ended_early):
        return found, reason
    return "equivalent_by_structure", "" if ended_early else f"no test at ±{margin:.2%} is claimed: {reason}"


def overall(verdicts: list[Verdict]) -> Verdict:
    """Of all cells: slower if one is, else the weakest claim of any of them.

    `equivalent` needs every cell to have passed its test, `equivalent_by_structure` every cell to be one or the
    other; no cell, or one that is inconclusive, leaves all of it so.
    """
    ranks: tuple[Verdict, ...] = ("slower", "inconclusive", "equivalent_by_structure", "equivalent")
    return min(verdicts, key=ranks.index, default="inconclusive")
