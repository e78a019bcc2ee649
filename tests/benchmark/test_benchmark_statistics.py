"""The statistics against scipy, and their error rates on simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_export.benchmark.measure import measure
from lora_export.benchmark.statistics import (
    MIN_BLOCKS,
    Interval,
    blocks_needed,
    judge,
    log_ratios,
    overall,
    ratio_interval,
    trimmed_mean,
)

MARGIN = 0.01


def interval(low: float, high: float) -> Interval:
    return Interval(math.sqrt(low * high), low, high, 0.001)


QUIET = interval(0.999, 1.001)
SLOW = interval(1.05, 1.06)


def test_trimmed_mean_is_scipys() -> None:
    values = np.random.default_rng(1).standard_normal((7, 23))
    np.testing.assert_allclose(trimmed_mean(values, axis=1), stats.trim_mean(values, 0.2, axis=1))


def test_interval_of_independent_blocks_agrees_with_scipys_bootstrap() -> None:
    logs = np.random.default_rng(2).normal(0.02, 0.01, 400)
    ours = ratio_interval(logs, np.random.default_rng(3), resamples=4000)
    theirs = stats.bootstrap(
        (logs,),
        lambda x, axis: stats.trim_mean(x, 0.2, axis=axis),
        confidence_level=0.9,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert ours.ratio == pytest.approx(math.exp(stats.trim_mean(logs, 0.2)))
    assert math.log(ours.low) == pytest.approx(theirs.low, abs=2e-4)
    assert math.log(ours.high) == pytest.approx(theirs.high, abs=2e-4)


def test_log_ratios_pair_block_medians() -> None:
    arm, reference = (
        np.array([[2.0, 2.0, 99.0], [4.0, 4.0, 4.0]]),
        np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]),
    )
    np.testing.assert_allclose(log_ratios(arm, reference), [math.log(2), math.log(2)])


@pytest.mark.parametrize("blocks", [15, 40])
def test_interval_covers_the_truth_nine_times_in_ten(blocks: int) -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(400):
        found = ratio_interval(rng.normal(0.01, 0.02, blocks), rng, resamples=300)
        hits += found.low <= math.exp(0.01) <= found.high
    assert 0.86 <= hits / 400 <= 0.97


@pytest.mark.parametrize(("sigma", "expected"), [(0.005, MIN_BLOCKS), (0.02, 44), (0.05, 273)])
def test_planned_pairs_follow_the_formula(sigma: float, expected: int) -> None:
    measured = Interval(1.0, 0.99, 1.01, se=sigma / math.sqrt(20))
    assert blocks_needed(measured, 20, MARGIN) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("merged", "floor", "control", "blocks", "verdict", "reason"),
    [
        (interval(0.995, 1.005), QUIET, SLOW, 20, "equivalent", ""),
        (interval(0.995, 1.005), QUIET, None, 20, "equivalent", ""),
        (interval(1.02, 1.03), QUIET, SLOW, 20, "slower", ""),
        (interval(1.02, 1.03), QUIET, QUIET, 20, "slower", ""),
        (interval(1.02, 1.03), interval(0.98, 1.0), SLOW, 20, "inconclusive", "noise floor"),
        (interval(0.995, 1.005), interval(0.98, 1.0), SLOW, 20, "inconclusive", "noise floor"),
        (interval(0.995, 1.005), QUIET, interval(0.99, 1.02), 20, "inconclusive", "positive control"),
        (interval(0.995, 1.02), QUIET, SLOW, 20, "inconclusive", "beyond the margin"),
        (interval(0.9, 0.95), QUIET, SLOW, 20, "inconclusive", "faster"),
        (interval(0.995, 1.005), QUIET, SLOW, 14, "inconclusive", "blocks"),
    ],
)
def test_verdicts(
    merged: Interval, floor: Interval, control: Interval | None, blocks: int, verdict: str, reason: str
) -> None:
    found, why = judge(merged, floor, control, blocks, MARGIN)
    assert found == verdict
    assert reason in why and bool(reason) == bool(why)


def test_one_slow_cell_is_enough_and_all_must_be_equivalent() -> None:
    assert overall(["equivalent", "slower", "inconclusive"]) == "slower"
    assert overall(["equivalent", "inconclusive"]) == "inconclusive"
    assert overall(["equivalent", "equivalent"]) == "equivalent"
    assert overall([]) == "inconclusive"


# --- simulated studies -------------------------------------------------------------------------------------


class Machine:
    """A clock and arms whose latency drifts, is autocorrelated, and is now and then disturbed."""

    def __init__(self, rng: np.random.Generator, sigma: float) -> None:
        self.rng, self.sigma, self.now, self.mood, self.calls = rng, sigma, 0.0, 0.0, 0

    def arm(self, ratio: float):  # type: ignore[no-untyped-def]
        def call() -> float:
            self.calls += 1
            self.mood = 0.9 * self.mood + self.rng.normal(0, self.sigma)
            drift = 1 + 1e-4 * self.calls
            stolen = 3.0 if self.rng.random() < 0.01 else 1.0
            ms = 20 * ratio * drift * stolen * math.exp(self.mood + self.rng.normal(0, self.sigma))
            self.now += ms / 1e3
            return float(ms)

        return call


def verdicts(ratio: float, studies: int, sigma: float) -> dict[str, float]:
    counts = {"equivalent": 0, "slower": 0, "inconclusive": 0}
    for seed in range(studies):
        rng = np.random.default_rng(seed)
        machine = Machine(rng, sigma)
        arms = {"base": machine.arm(1), "again": machine.arm(1), "merged": machine.arm(ratio)}
        series = measure(
            arms,
            pairs=(("again", ("base",)), ("merged", ("base", "again"))),
            margin=MARGIN,
            seconds=60,
            rng=rng,
            clock=lambda m=machine: m.now,  # type: ignore[misc]
        )
        merged = series.against("merged", "base", "again", rng=rng)
        floor = series.against("again", "base", rng=rng)
        counts[judge(merged, floor, None, series.blocks, MARGIN)[0]] += 1
    return {name: count / studies for name, count in counts.items()}


def test_no_difference_is_found_equivalent_and_not_slower() -> None:
    rates = verdicts(1.0, 60, sigma=0.004)
    assert rates["equivalent"] >= 0.90
    assert rates["slower"] <= 0.05


def test_three_percent_is_not_called_equivalent() -> None:
    rates = verdicts(1.03, 60, sigma=0.004)
    assert rates["equivalent"] <= 0.05
    assert rates["slower"] >= 0.90


def test_a_difference_of_just_the_margin_is_called_neither_more_than_once_in_twenty() -> None:
    rates = verdicts(1.01, 100, sigma=0.004)
    assert rates["equivalent"] <= 0.09
    assert rates["slower"] <= 0.09


def test_a_machine_too_noisy_gives_no_verdict() -> None:
    assert verdicts(1.0, 20, sigma=0.1)["inconclusive"] >= 0.95
