"""The order of calls, warm-up, planning and the time limit, on arms that only move a clock."""

import gc
from collections.abc import Callable

import numpy as np

from lora_export.benchmarking.measure import CHECK_BLOCKS, Series, block, check, joined, measure, warm_up
from lora_export.benchmarking.statistics import MIN_BLOCKS


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def arm(self, name: str, latencies: Callable[[int], float]) -> Callable[[], float]:
        def call() -> float:
            ms = latencies(self.called.count(name))
            self.called.append(name)
            self.now += ms / 1000
            return ms

        return call


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_block_is_order_and_reverse() -> None:
    clock = Clock()
    arms = {name: clock.arm(name, lambda i: 1.0) for name in "abc"}
    # Each call is 1 ms slower than the one before, whoever makes it.
    drifting = {name: lambda name=name: arms[name]() + len(clock.called) for name in "abc"}
    times = block(drifting, 1, rng())
    assert clock.called[:3] == clock.called[:2:-1]
    assert len({sum(t) for t in times.values()}) == 1


def test_disturbing_arms_run_last() -> None:
    clock = Clock()
    arms = {name: clock.arm(name, lambda i: 1.0) for name in "abz"}
    times = block(arms, 4, rng(), apart=("z",))
    assert clock.called[-4:] == ["z"] * 4 and "z" not in clock.called[:-4]
    assert {name: len(t) for name, t in times.items()} == {"a": 8, "b": 8, "z": 4}


def test_block_orders_differ() -> None:
    clock = Clock()
    arms = {name: clock.arm(name, lambda i: 1.0) for name in "abcd"}
    block(arms, 10, rng())
    assert len({tuple(clock.called[i : i + 4]) for i in range(0, 80, 8)}) > 3


def test_warm_up_continues_until_drift_is_small() -> None:
    clock = Clock()
    arms = {"a": clock.arm("a", lambda i: max(10.0, 100.0 - 5 * i))}
    medians, settled = warm_up(arms, 0.01, 1e9, rng(), clock)
    assert settled and medians == {"a": 10.0}
    assert len(clock.called) > 20


def test_warm_up_stops_at_time_limit() -> None:
    clock = Clock()
    _, settled = warm_up({"a": clock.arm("a", lambda i: 10.0 * 2**i)}, 0.01, 0.05, rng(), clock)
    assert not settled
    assert len(clock.called) < 10


def test_warm_up_of_long_calls_is_one_round() -> None:
    clock = Clock()
    medians, settled = warm_up({n: clock.arm(n, lambda i: 9000.0) for n in "ab"}, 0.01, 5.0, rng(), clock)
    assert sorted(clock.called) == ["a", "b"] and medians == {"a": 9000.0, "b": 9000.0} and not settled


def noisy(clock: Clock, sigma: float) -> dict[str, Callable[[], float]]:
    dice = np.random.default_rng(7)
    return {name: clock.arm(name, lambda i: float(20 * np.exp(dice.normal(0, sigma)))) for name in ("x", "y")}


def _sets(dice: np.random.Generator, count: int, sigma: float, ratio: float) -> Series:
    """Sets of sessions of two arms: each session is faster or slower than the next by sigma, for all its blocks."""
    found = []
    for _ in range(count):
        own = {name: 20 * np.exp(dice.normal(0, sigma)) for name in ("x", "y")}
        own["x"] *= ratio
        found.append(Series({n: t * np.exp(dice.normal(0, 0.002, (15, 4))) for n, t in own.items()}, True))
    return joined(found)


def test_interval_of_differing_sessions_covers_their_spread() -> None:
    dice = np.random.default_rng(11)

    def coverage(count: int) -> float:
        intervals = [_sets(dice, count, 0.03, 1.02).against("x", "y", rng=dice) for _ in range(100)]
        return sum(i.low <= 1.02 <= i.high for i in intervals) / 100

    assert coverage(1) < 0.3
    assert coverage(12) > 0.8


def test_session_sets_join_block_by_block() -> None:
    a, b = _sets(rng(), 1, 0.0, 1.0), _sets(rng(), 1, 0.0, 1.0)
    both = joined([a, b])
    assert both.sets == (15, 15) and both.blocks == 30
    np.testing.assert_array_equal(both.times["x"][15:], b.times["x"])


def test_planned_blocks_grow_with_noise() -> None:
    counts = []
    for sigma in (0.0001, 0.05, 0.12):
        clock = Clock()
        series = measure(
            noisy(clock, sigma), pairs=(("x", ("y",)),), margin=0.01, seconds=1e6, rng=rng(), clock=clock
        )
        counts.append(series.blocks)
    assert counts[0] == 15
    assert 20 < counts[1] < counts[2]


def test_time_limit_holds_and_is_reported() -> None:
    clock = Clock()
    arms = noisy(clock, 0.2)
    series = measure(arms, pairs=(("x", ("y",)),), margin=0.01, seconds=3.0, rng=rng(), clock=clock)
    assert clock.now < 3.5
    assert 2 <= series.blocks < 60


def test_measure_keeps_every_sample_and_restores_gc() -> None:
    clock = Clock()
    series = measure(noisy(clock, 0.001), pairs=(("x", ("y",)),), margin=0.05, seconds=10, rng=rng(), clock=clock)
    passes = round(250 / (2 * 2 * 20))
    assert {t.shape for t in series.times.values()} == {(series.blocks, 2 * passes)}
    assert gc.isenabled()


# --- a check of arms that should not differ ------------------------------------------------------------------


def checked(clock: Clock, ms: dict[str, float], apart: tuple[str, ...] = (), noise: float = 0.001) -> Series:
    dice = np.random.default_rng(7)
    arms = {
        name: clock.arm(name, lambda i, at=at: float(at * np.exp(dice.normal(0, noise)))) for name, at in ms.items()
    }
    return check(arms, arm="m", references=("a", "b"), rng=rng(), clock=clock, apart=apart)


def test_check_of_slow_calls_ends_after_few_blocks_of_one_call() -> None:
    clock = Clock()
    series = checked(clock, {"a": 400.0, "b": 400.0, "m": 400.0})
    assert {t.shape for t in series.times.values()} == {(CHECK_BLOCKS, 1)}
    for first in range(0, len(clock.called), 6):  # a block, and the same in reverse
        assert clock.called[first : first + 3] == clock.called[first + 3 : first + 6][::-1]


def test_check_of_short_calls_ends_after_least_blocks_of_a_test() -> None:
    assert checked(Clock(), {"a": 1.0, "b": 1.0, "m": 1.0}).blocks == MIN_BLOCKS


def test_check_of_noise_does_not_go_on() -> None:
    assert checked(Clock(), {"a": 400.0, "b": 400.0, "m": 400.0}, noise=0.2).blocks == CHECK_BLOCKS


def test_check_of_a_slower_arm_goes_on_to_least_blocks_of_a_test() -> None:
    assert checked(Clock(), {"a": 400.0, "b": 400.0, "m": 440.0}).blocks == MIN_BLOCKS


def test_check_runs_disturbing_arms_last_and_restores_gc() -> None:
    clock = Clock()
    checked(clock, {"z": 400.0, "a": 400.0, "b": 400.0, "m": 400.0}, apart=("z",))
    assert clock.called[3::4] == ["z"] * CHECK_BLOCKS and gc.isenabled()
