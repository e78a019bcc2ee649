"""The statistics against scipy, and their error rates on simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_export.benchmarking import statistics
from lora_export.benchmarking.statistics import (
    MIN_BLOCKS,
    NOT_NUMBERS,
    Interval,
    _circular_blocks,
    _small_sample_stretch,
    blocks_needed,
    judge,
    log_ratios,
    on_one_graph,
    overall,
    percentiles,
    ratio_interval,
    trimmed_mean,
)
from lora_export.choices import Verdict

from .machine import MARGIN, NOISES, Noise, rates, suspected


def interval(low: float, high: float) -> Interval:
    return Interval(math.sqrt(low * high), low, high, 0.001)


QUIET = interval(0.999, 1.001)
SLOW = interval(1.05, 1.06)


def test_trimmed_mean_matches_scipy() -> None:
    values = np.random.default_rng(1).standard_normal((7, 23))
    np.testing.assert_allclose(trimmed_mean(values, axis=1), stats.trim_mean(values, 0.2, axis=1))
    np.testing.assert_allclose(trimmed_mean(values, axis=0), stats.trim_mean(values, 0.2, axis=0))
    assert trimmed_mean(values.astype(np.float32)).dtype == np.float64


def one_by_one(n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks drawn one by one, as scipy does; not in runs."""
    return rng.integers(0, n, (resamples, n))


def test_interval_of_independent_blocks_matches_scipy_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_circular_blocks", one_by_one)
    logs = np.random.default_rng(2).normal(0.02, 0.01, 400)
    ours = ratio_interval(logs, np.random.default_rng(3), resamples=10000)
    result = stats.bootstrap(
        (logs,),
        lambda x, axis: stats.trim_mean(x, 0.2, axis=axis),
        confidence_level=0.9,
        method="percentile",
        n_resamples=10000,
        rng=np.random.default_rng(3),
    )
    theirs = result.confidence_interval
    assert ours.ratio == pytest.approx(math.exp(stats.trim_mean(logs, 0.2)))
    near = 0.1 * result.standard_error  # a quantile of 3 % in the place of 5 % is off by 0.19
    assert math.log(ours.low) == pytest.approx(theirs.low, abs=near)
    assert math.log(ours.high) == pytest.approx(theirs.high, abs=near)
    assert ours.se == pytest.approx(result.standard_error, rel=0.03)


def test_interval_of_runs_of_independent_blocks_is_similar() -> None:
    logs = np.random.default_rng(2).normal(0.02, 0.01, 400)
    found = ratio_interval(logs, np.random.default_rng(3))
    expected = stats.bootstrap((logs,), lambda x, axis: stats.trim_mean(x, 0.2, axis=axis), rng=1, n_resamples=2000)
    assert found.se == pytest.approx(expected.standard_error, rel=0.25)


@pytest.mark.parametrize(
    ("blocks", "student"),
    [(2, 6.314), (3, 2.920), (10, 2.015), (15, 1.860), (35, 1.725), (100, 1.671)],  # printed tables, one-sided 5 %
)
def test_interval_of_few_blocks_uses_student_t(blocks: int, student: float) -> None:
    """With the degrees of freedom of the kept blocks, and n/(n-1) as the bootstrap's variance is the biased one."""
    expected = student / 1.6449 * math.sqrt(blocks / (blocks - 1))
    assert _small_sample_stretch(blocks) == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(("blocks", "run"), [(2, 1), (3, 1), (4, 2), (27, 3), (28, 3), (50, 4), (1000, 10)])
def test_bootstrap_draws_circular_runs(blocks: int, run: int) -> None:
    drawn = _circular_blocks(blocks, 300, np.random.default_rng(5))
    assert drawn.shape == (300, blocks)
    assert set(drawn.ravel()) == set(range(blocks))
    follows = (drawn[:, :-1] + 1) % blocks == drawn[:, 1:]
    inside = np.arange(1, blocks) % run != 0  # places that are not the first of a run
    assert follows[:, inside].all()
    assert abs(follows[:, ~inside].mean() - 1 / blocks) < 0.1
    counts = np.bincount(drawn[:, 0], minlength=blocks)  # each block begins a run as often as another
    assert stats.chisquare(counts).pvalue > 0.001


def test_interval_needs_two_blocks() -> None:
    one = ratio_interval(np.array([0.5]), np.random.default_rng(0))
    assert one == Interval(math.exp(0.5), 0.0, math.inf, math.inf)
    two = ratio_interval(np.array([0.5, 0.6]), np.random.default_rng(0))
    assert 0 < two.low < two.ratio < two.high < math.inf and 0 < two.se < math.inf


def test_verdict_equivalence_is_two_one_sided_tests() -> None:
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


def test_percentiles_of_independent_blocks_match_scipy_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_circular_blocks", one_by_one)
    monkeypatch.setattr(statistics, "_PERCENTILE_RESAMPLES", 3000)
    times = np.random.default_rng(6).lognormal(3, 0.2, (300, 4))
    found = percentiles(times, np.random.default_rng(7))
    for percentile, q in zip(found, (0.50, 0.95, 0.99), strict=True):
        theirs = stats.bootstrap(
            (np.arange(300),),
            lambda rows, q=q: np.quantile(times[rows.astype(int)], q),
            vectorized=False,
            confidence_level=0.9,
            method="percentile",
            n_resamples=3000,
            rng=np.random.default_rng(8),
        ).confidence_interval
        width = theirs.high - theirs.low
        assert percentile.ms == pytest.approx(np.quantile(times, q))
        assert percentile.low == pytest.approx(theirs.low, abs=0.1 * width)
        assert percentile.high == pytest.approx(theirs.high, abs=0.1 * width)


def test_percentiles_resample_whole_blocks() -> None:
    """Calls of a block that are all alike are one observation, not twenty."""
    blocks = np.random.default_rng(9).lognormal(3, 0.2, (20, 1))
    alone, repeated = (percentiles(t, np.random.default_rng(1))[0] for t in (blocks, np.repeat(blocks, 20, axis=1)))
    assert repeated.high - repeated.low > 0.8 * (alone.high - alone.low)


def test_percentiles_of_one_block_have_no_interval() -> None:
    (p50, *_) = percentiles(np.array([[1.0, 2.0, 3.0]]), np.random.default_rng(0))
    assert (p50.ms, p50.low, p50.high) == (2.0, 0.0, math.inf)
    (p50, *_) = percentiles(np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]), np.random.default_rng(0))
    assert (p50.ms, p50.low, p50.high) == (3.0, 2.0, 4.0)


def test_log_ratios_pair_block_medians() -> None:
    arm, reference = (
        np.array([[2.0, 2.0, 99.0], [4.0, 4.0, 4.0]]),
        np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]),
    )
    np.testing.assert_allclose(log_ratios(arm, reference), [math.log(2), math.log(2)])


@pytest.mark.parametrize("blocks", [15, 40])
def test_interval_covers_truth_nine_times_in_ten(blocks: int) -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(400):
        found = ratio_interval(rng.normal(0.01, 0.02, blocks), rng, resamples=300)
        hits += found.low <= math.exp(0.01) <= found.high
    assert 0.86 <= hits / 400 <= 0.97


@pytest.mark.parametrize(("sigma", "expected"), [(0.005, MIN_BLOCKS), (0.02, 44), (0.05, 273)])
def test_planned_pairs_follow_formula(sigma: float, expected: int) -> None:
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
def test_verdict_of_intervals(
    merged: Interval, floor: Interval, control: Interval | None, blocks: int, verdict: str, reason: str
) -> None:
    found, why = judge(merged, floor, control, blocks, MARGIN)
    assert found == verdict
    assert reason in why and bool(reason) == bool(why)


WIDE = 1.0  # a margin whose edges, 1/2 and 2, are exact in floating point
STILL = Interval(1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("merged", "floor", "control", "verdict", "reason"),
    [
        ((0.5, 2.0), STILL, None, "equivalent", ""),  # on both edges
        ((0.5, 2.0), Interval(1.0, 1.0, 2.0, 0.0), None, "equivalent", ""),  # noise as large as the margin
        ((2.0, 3.0), STILL, None, "inconclusive", "the interval reaches beyond the margin after 15 blocks"),
        ((0.4, 0.5), STILL, None, "inconclusive", "the interval reaches beyond the margin after 15 blocks"),
        ((0.4, 1.5), STILL, None, "inconclusive", "the interval reaches beyond the margin after 15 blocks"),
        (
            (0.3, 0.4),
            STILL,
            None,
            "inconclusive",
            "merged was faster by more than the margin, which merging cannot explain",
        ),
        (
            (0.5, 2.0),
            STILL,
            Interval(1.1, 1.0, 1.2, 0.0),
            "inconclusive",
            "the positive control failed: unmerged does more work than the base but was not found slower (ratio "
            "1.1000, 90 % interval 1.0000–1.2000)",
        ),
        (
            (8.0, 9.0),
            Interval(1.0, 1.0, 4.0, 0.0),
            None,
            "inconclusive",
            "the noise floor (300.00%) exceeds the margin (100.00%): give it more time, a quieter machine, or more "
            "--sessions if it is two sessions of one graph that differ",
        ),
    ],
)
def test_verdict_at_the_edges(
    merged: tuple[float, float], floor: Interval, control: Interval | None, verdict: str, reason: str
) -> None:
    assert judge(interval(*merged), floor, control, MIN_BLOCKS, WIDE) == (verdict, reason)


@pytest.mark.parametrize(
    ("sessions", "merged", "verdict", "reason"),
    [
        (2, (0.995, 1.005), "inconclusive", "only 2 sets of sessions; a spread needs at least 6"),
        (5, (1.02, 1.03), "inconclusive", "only 5 sets of sessions; a spread needs at least 6"),
        (6, (0.995, 1.005), "equivalent", ""),
        (6, (1.02, 1.03), "slower", ""),
        (
            6,
            (0.995, 1.02),
            "inconclusive",
            "the interval reaches beyond the margin after 20 blocks of 6 sets of sessions",
        ),
    ],
)
def test_verdict_from_session_sets(sessions: int, merged: tuple[float, float], verdict: str, reason: str) -> None:
    assert judge(interval(*merged), QUIET, SLOW, 20, MARGIN, sessions=sessions) == (verdict, reason)


@pytest.mark.parametrize(
    ("found", "reason", "early", "verdict", "why"),
    [
        ("slower", "", False, "slower", ""),
        ("slower", "", True, "slower", ""),
        ("equivalent", "", False, "equivalent", ""),
        ("equivalent", "", True, "equivalent_by_structure", ""),
        ("inconclusive", "noise", True, "equivalent_by_structure", ""),
        ("inconclusive", "noise", False, "equivalent_by_structure", "no test at ±1.00% is claimed: noise"),
        ("inconclusive", NOT_NUMBERS, False, "inconclusive", NOT_NUMBERS),
        ("inconclusive", NOT_NUMBERS, True, "inconclusive", NOT_NUMBERS),
    ],
)
def test_verdict_on_one_graph_needs_no_test(
    found: Verdict, reason: str, early: bool, verdict: Verdict, why: str
) -> None:
    assert on_one_graph(found, reason, MARGIN, ended_early=early) == (verdict, why)


def test_overall_verdict_is_worst_cell() -> None:
    assert overall(["equivalent", "slower", "inconclusive"]) == "slower"
    assert overall(["equivalent_by_structure", "slower"]) == "slower"
    assert overall(["equivalent_by_structure", "inconclusive", "equivalent"]) == "inconclusive"
    assert overall(["equivalent", "equivalent_by_structure"]) == "equivalent_by_structure"
    assert overall(["equivalent", "inconclusive"]) == "inconclusive"
    assert overall(["equivalent", "equivalent"]) == "equivalent"
    assert overall([]) == "inconclusive"


# --- simulated studies: tools/simulate_verdicts.py has many more -------------------------------------------

HARD = NOISES["all of these"]


def test_simulated_no_difference_is_equivalent() -> None:
    found = rates(1.0, HARD, 12)
    assert found["equivalent"] >= 10 / 12 and found["slower"] == 0


def test_simulated_three_percent_is_slower() -> None:
    found = rates(1.03, HARD, 12)
    assert found["slower"] >= 10 / 12 and found["equivalent"] == 0


def test_simulated_noisy_machine_is_inconclusive() -> None:
    assert rates(1.0, Noise(own=0.1, mood=0.1), 4)["inconclusive"] == 1


def test_simulated_check_suspects_what_is_slower_and_seldom_what_is_not() -> None:
    found = {ratio: sum(suspected(ratio, Noise(), seed) for seed in range(15)) for ratio in (1.0, 1.1)}
    assert found[1.0] <= 1 and found[1.1] >= 13


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISES)
def test_simulated_error_rates_hold_under_every_noise(name: str) -> None:
    same, margin, slower = (rates(ratio, NOISES[name], 100) for ratio in (1.0, 1 + MARGIN, 1.03))
    assert same["slower"] <= 0.05 and same["equivalent"] >= 0.90
    assert slower["equivalent"] <= 0.05 and slower["slower"] >= 0.90
    assert margin["equivalent"] <= 0.09 and margin["slower"] <= 0.09  # 5 % each, and the luck of 100 studies
