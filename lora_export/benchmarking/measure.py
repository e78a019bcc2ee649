"""Time several arms side by side until their noise allows a verdict or the time is up."""

import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from lora_export.benchmarking.statistics import (
    MIN_BLOCKS,
    Array,
    Interval,
    blocks_needed,
    log_ratios,
    ratio_interval,
    trimmed_mean,
)
from lora_export.contracts import Reading

Timed = Callable[[], float]  # runs once and returns its latency in milliseconds
Clock = Callable[[], float]  # seconds
Pairs = Sequence[tuple[str, Sequence[str]]]  # an arm and the arms whose mean it is compared with

_WARM_UP_WINDOW = 3
_WARM_UP_SHARE = 0.2
_MAX_WARM_UP_ROUNDS = 100
# Short calls are repeated in a block, so that a single disturbed call does not move its median.
_BLOCK_MS = 250.0
_MAX_PASSES = 50
_PLANNING_RESAMPLES = 500
# A check of two arms that should not differ: so many blocks at least, and more while they fit into this time.
CHECK_BLOCKS = 4
_CHECK_SECONDS = 0.75
# OpenMP's threads keep spinning for a few milliseconds after their work is done.
_SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class Series:
    """Raw latencies: arm → (blocks, calls) in milliseconds. settled: drift was small when warm-up ended.

    readings: what `observe` said after each block; sets: how many of the blocks each set of sessions was measured
    in; passes: of a block.
    """

    times: Mapping[str, Array]
    settled: bool
    readings: tuple[Reading, ...] = ()
    sets: tuple[int, ...] = ()
    passes: int = 1

    @property
    def blocks(self) -> int:
        return len(next(iter(self.times.values())))

    @property
    def sessions(self) -> int:
        """How many sets of sessions it comes from."""
        return len(self.sets) or 1

    def median(self, *arms: str) -> float | None:
        """Of all calls of these arms together; None where none of them was measured."""
        calls = [self.times[arm].ravel() for arm in arms if arm in self.times]
        return float(np.median(np.concatenate(calls))) if calls else None

    def against(self, arm: str, *references: str, rng: np.random.Generator) -> Interval:
        """From blocks, or from the means of several sets of sessions: more blocks do not average out what all
        blocks of one set share, such as where its memory lies."""
        logs = log_ratios(self.times[arm], *(self.times[r] for r in references))
        if self.sessions > 1:
            ends = np.cumsum(self.sets)
            logs = np.array([float(trimmed_mean(part)) for part in np.split(logs, ends[:-1])])
        return ratio_interval(logs, rng)


def joined(series: Sequence[Series]) -> Series:
    """Several sets of sessions of the same arms as one series. Their blocks must have the same number of calls."""
    names = [n for n in series[0].times if all(n in s.times for s in series)]
    return Series(
        times={name: np.concatenate([s.times[name] for s in series]) for name in names},
        settled=all(s.settled for s in series),
        readings=tuple(r for s in series for r in s.readings),
        sets=tuple(s.blocks for s in series),
    )


def measure(
    arms: Mapping[str, Timed],
    *,
    pairs: Pairs,
    margin: float,
    seconds: float,
    rng: np.random.Generator,
    clock: Clock = time.perf_counter,
    tick: Callable[[int, int], None] = lambda done, planned: None,
    observe: Callable[[], Reading] | None = None,
    apart: Collection[str] = (),
    passes: int | None = None,
) -> Series:
    """Warm up, then measure blocks until there are enough for every pair.

    The number of blocks follows from the variance alone, never from the difference seen, so measuring on
    does not favour a verdict. observe: called between blocks, its readings are kept. apart: arms that would disturb
    those that run after them; passes: of a block, None: as many as fit into a quarter of a second.
    """
    deadline = clock() + seconds
    with _no_garbage_collection():
        typical, settled = warm_up(arms, margin, clock() + _WARM_UP_SHARE * seconds, rng, clock)
        passes = passes or _passes(2 * sum(typical.values()), seconds)
        blocks: list[dict[str, list[float]]] = []
        readings: list[Reading] = []
        if observe:
            observe()  # the first reading covers what came before
        planned = MIN_BLOCKS
        while len(blocks) < planned and (len(blocks) < 2 or clock() < deadline):
            blocks.append(block(arms, passes, rng, apart))
            readings += [observe()] if observe else []
            if len(blocks) == planned:
                planned = _plan(blocks, pairs, margin, rng)
            tick(len(blocks), planned)
    times = {name: np.array([b[name] for b in blocks]) for name in arms}
    return Series(times, settled, tuple(readings), passes=passes)


def check(
    arms: Mapping[str, Timed],
    *,
    arm: str,
    references: Sequence[str],
    rng: np.random.Generator,
    clock: Clock = time.perf_counter,
    tick: Callable[[int, int], None] = lambda done, planned: None,
    observe: Callable[[], Reading] | None = None,
    apart: Collection[str] = (),
) -> Series:
    """Measure until `arm` does not look slower than the references, of which it is known to be a copy.

    Every arm is called once a block, each second block in the reverse order of the one before. It ends after few
    blocks, or MIN_BLOCKS where the interval lies above the references. Arms must have run before, as there is no
    warm-up.
    """
    deadline = clock() + _CHECK_SECONDS
    blocks: list[dict[str, list[float]]] = []
    readings: list[Reading] = []
    order: list[str] = []

    def enough() -> bool:
        if len(blocks) < CHECK_BLOCKS or len(blocks) >= MIN_BLOCKS:
            return len(blocks) >= MIN_BLOCKS
        if clock() < deadline:
            return False
        logs = log_ratios(*(np.array([b[name] for b in blocks]) for name in (arm, *references)))
        return not ratio_interval(logs, rng, _PLANNING_RESAMPLES).low > 1

    with _no_garbage_collection():
        if observe:
            observe()
        while not enough():
            names = [name for name in arms if name not in apart]
            order = order[::-1] if len(blocks) % 2 else [names[i] for i in rng.permutation(len(names))]
            blocks.append({name: [arms[name]()] for name in (*order, *apart)})
            readings += [observe()] if observe else []
            if apart:
                time.sleep(_SETTLE_SECONDS)
            tick(len(blocks), MIN_BLOCKS)
    times = {name: np.array([b[name] for b in blocks]) for name in arms}
    return Series(times, settled=True, readings=tuple(readings))


def _passes(pass_ms: float, seconds: float) -> int:
    """ABBA passes a block: fewer where the time would not hold twice the least number of blocks."""
    block_ms = min(_BLOCK_MS, 1000 * seconds / (2 * MIN_BLOCKS))
    return min(_MAX_PASSES, max(1, round(block_ms / pass_ms)))


def block(
    arms: Mapping[str, Timed], passes: int, rng: np.random.Generator, apart: Collection[str] = ()
) -> dict[str, list[float]]:
    """Every arm in random order and then in the reverse order (ABBA), so that a linear drift cancels.

    Arms that are kept apart come after all others, once for each pass.
    """
    names = [name for name in arms if name not in apart]
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(passes):
        order = [names[i] for i in rng.permutation(len(names))]
        for name in (*order, *reversed(order)):
            times[name].append(arms[name]())
    for name in apart:
        times[name] += [arms[name]() for _ in range(passes)]
    if apart:
        time.sleep(_SETTLE_SECONDS)
    return times


def warm_up(
    arms: Mapping[str, Timed], margin: float, deadline: float, rng: np.random.Generator, clock: Clock
) -> tuple[dict[str, float], bool]:
    """Run the arms in turns until two windows in a row agree within the margin; medians of the last window.

    At least one round, whatever the deadline: the first calls allocate and tune.
    """
    history: dict[str, list[float]] = {name: [] for name in arms}
    medians: dict[str, float] = {}
    for round_number in range(1, _MAX_WARM_UP_ROUNDS + 1):
        for i in rng.permutation(len(arms)):
            name = list(arms)[i]
            history[name].append(arms[name]())
        late = clock() >= deadline
        if round_number % _WARM_UP_WINDOW and not late:
            continue
        before, medians = medians, {n: float(np.median(h[-_WARM_UP_WINDOW:])) for n, h in history.items()}
        if before and all(abs(medians[n] / before[n] - 1) <= margin for n in arms):
            return medians, True
        if late:
            break
    return medians, False


def _plan(
    blocks: list[dict[str, list[float]]],
    pairs: Pairs,
    margin: float,
    rng: np.random.Generator,
) -> int:
    def needed(arm: str, references: Sequence[str]) -> int:
        logs = log_ratios(*(np.array([b[name] for b in blocks]) for name in (arm, *references)))
        return blocks_needed(ratio_interval(logs, rng, _PLANNING_RESAMPLES), len(blocks), margin)

    return max((needed(*pair) for pair in pairs), default=MIN_BLOCKS)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection would fall on one arm or another and count as its latency."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
