"""The statistics against scipy, and their error rates on simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_export.benchmarking.statistics import (
    MIN_BLOCKS,
    Interval,
    blocks_needed,
    judge,
    log_ratios,
    overall,
    percentiles,
    ratio_interval,
    trimmed_mean,
)

from .machine import MARGIN, NOISES, Noise, rates


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


def test_equivalence_is_two_one_sided_tests() -> None:
    """Against scipy's t-tests, on normal logs: they and a trimmed, bootstrapped mean may differ at the edge
    only."""
    dice = np.random.default_rng(4)
    agree, found = 0, []
    edges = (math.log(1 / (1 + MARGIN)), math.log(1 + MARGIN))
    for i in range(60):
        logs = dice.normal((i % 12) * 0.001, 0.012, 60)
        low = stats.ttest_1samp(logs, edges[0], alternative="greater").pvalue
        high = stats.ttest_1samp(logs, edges[1], alternative="less").pvalue
        expected = max(low, high) < 0.05
        verdict, _ = judge(ratio_interval(logs, dice, 500), QUIET, None, 60, MARGIN)
        agree += expected == (verdict == "equivalent")
        found.append(expected)
    assert agree >= 54 and 10 < sum(found) < 50


def test_percentiles_of_independent_blocks_agree_with_scipys_bootstrap() -> None:
    times = np.random.default_rng(6).lognormal(3, 0.2, (300, 4))
    found = percentiles(times, np.random.default_rng(7))
    for percentile, q in zip(found, (0.50, 0.95, 0.99), strict=True):
        theirs = stats.bootstrap(
            (np.arange(300),),
            lambda rows, q=q: np.quantile(times[rows.astype(int)], q),
            vectorized=False,
            confidence_level=0.9,
            method="percentile",
            n_resamples=400,
            rng=np.random.default_rng(8),
        ).confidence_interval
        width = theirs.high - theirs.low
        assert percentile.ms == pytest.approx(np.quantile(times, q))
        assert percentile.low == pytest.approx(theirs.low, abs=0.25 * width)
        assert percentile.high == pytest.approx(theirs.high, abs=0.25 * width)


def test_percentiles_keep_the_calls_of_a_block_together() -> None:
    """Calls of a block that are all alike are one observation, not twenty."""
    blocks = np.random.default_rng(9).lognormal(3, 0.2, (20, 1))
    alone, repeated = (percentiles(t, np.random.default_rng(1))[0] for t in (blocks, np.repeat(blocks, 20, axis=1)))
    assert repeated.high - repeated.low > 0.8 * (alone.high - alone.low)


def test_one_block_has_percentiles_and_no_interval() -> None:
    (p50, *_) = percentiles(np.array([[1.0, 2.0, 3.0]]), np.random.default_rng(0))
    assert (p50.ms, p50.low, p50.high) == (2.0, 0.0, math.inf)


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
        (interval(1.029, 1.05), interval(0.98, 1.0), SLOW, 20, "inconclusive", "noise floor"),
        (interval(1.032, 1.05), interval(0.98, 1.0), SLOW, 20, "slower", ""),
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


# --- simulated studies: tools/simulate_verdicts.py has many more -------------------------------------------

HARD = NOISES["all of these"]


def test_no_difference_is_found_equivalent_and_not_slower() -> None:
    found = rates(1.0, HARD, 12)
    assert found["equivalent"] >= 10 / 12 and found["slower"] == 0


def test_three_percent_is_found_slower_and_not_equivalent() -> None:
    found = rates(1.03, HARD, 12)
    assert found["slower"] >= 10 / 12 and found["equivalent"] == 0


def test_a_machine_too_noisy_gives_no_verdict() -> None:
    assert rates(1.0, Noise(own=0.1, mood=0.1), 4)["inconclusive"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISES)
def test_error_rates_under_every_noise(name: str) -> None:
    same, margin, slower = (rates(ratio, NOISES[name], 100) for ratio in (1.0, 1 + MARGIN, 1.03))
    assert same["slower"] <= 0.05 and same["equivalent"] >= 0.90
    assert slower["equivalent"] <= 0.05 and slower["slower"] >= 0.90
    assert margin["equivalent"] <= 0.09 and margin["slower"] <= 0.09  # 5 % each, and the luck of 100 studies
