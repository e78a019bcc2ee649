"""One cell of the benchmark: what is to be measured, and what its timings say."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_export.benchmarking.buffers import Shape
from lora_export.benchmarking.measure import Series
from lora_export.benchmarking.statistics import Interval, judge, on_one_graph, percentiles
from lora_export.choices import Phase, Verdict
from lora_export.contracts import ArmTimes, Cell

BASE, AGAIN, MERGED, UNMERGED, PLUGGED, DELAYED = "base", "base_again", "merged", "unmerged", "plugged", "delayed"
CONTROLS = (UNMERGED, PLUGGED, DELAYED)  # the first of them that is there must be found slower
INCONCLUSIVE: Verdict = "inconclusive"
DELAY = 2.0  # margins by which the base is held up where nothing else does more work than it


@dataclass(frozen=True)
class CellSpec:
    """One cell to measure, before anything is known about it."""

    batch: int
    prompt: int
    phase: Phase
    cuda_graph: bool

    @property
    def key(self) -> str:
        return f"b{self.batch}/p{self.prompt}/{self.phase}" + ("/cuda_graph" if self.cuda_graph else "")

    @property
    def shape(self) -> Shape:
        return Shape.of(self.phase, self.batch, self.prompt)


@dataclass(frozen=True)
class CellFacts:
    """What is known about a cell besides its timings. decoder: a prompt's call ends with the first new token's
    logits; kv_in_place: as in Cell; memory: arm → bytes; one_graph: base and merged are identical; ended_early: it
    was checked only, not tested."""

    decoder: bool
    kv_in_place: bool
    memory: Mapping[str, int]
    one_graph: bool = False
    ended_early: bool = False


def conclude(spec: CellSpec, series: Series, margin: float, rng: np.random.Generator, facts: CellFacts) -> Cell:
    """The cell, with a reason in words where its verdict needs one.

    Two sessions of one graph differ by where their memory happens to lie. So every arm is compared with the mean of
    both sessions of the base, and the difference between those two is the noise floor.
    """
    merged_ms = series.median(MERGED)
    assert merged_ms is not None
    ratios: dict[str, Interval] = {}
    control, verdict, reason = None, INCONCLUSIVE, ""
    if {BASE, AGAIN} <= series.times.keys():
        others = [name for name in series.times if name not in (BASE, AGAIN)]
        ratios = {name: series.against(name, BASE, AGAIN, rng=rng) for name in others}
        ratios[AGAIN] = series.against(AGAIN, BASE, rng=rng)
        control = next((name for name in CONTROLS if name in ratios), None)
        shown = ratios[control] if control else None
        verdict, reason = judge(
            ratios[MERGED], ratios[AGAIN], shown, series.blocks, margin, control or "", series.sessions
        )
        if facts.one_graph:
            verdict, reason = on_one_graph(verdict, reason, margin, ended_early=facts.ended_early)
    ratio, low, high = _figures(ratios.get(MERGED))
    unmerged_ratio, unmerged_low, unmerged_high = _figures(ratios.get(UNMERGED))
    return Cell(
        **vars(spec),
        base_ms=series.median(BASE, AGAIN),
        merged_ms=merged_ms,
        unmerged_ms=series.median(UNMERGED),
        ratio=ratio,
        ci_low=low,
        ci_high=high,
        verdict=verdict,
        noise_floor=ratios[AGAIN].half_width if ratios else None,
        unmerged_ratio=unmerged_ratio,
        unmerged_ci_low=unmerged_low,
        unmerged_ci_high=unmerged_high,
        pairs=series.blocks,
        sessions=series.sessions,
        kv_in_place=facts.kv_in_place,
        control=control,
        reason=reason,
        arms={n: _times(spec, series, n, ratios.get(n), facts, rng) for n in series.times if n != AGAIN},
    )


def _figures(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    return (interval.ratio, interval.low, interval.high) if interval else (None, None, None)


def _times(
    spec: CellSpec, series: Series, name: str, ratio: Interval | None, facts: CellFacts, rng: np.random.Generator
) -> ArmTimes:
    """Both sessions of the base count as one arm."""
    sessions = [series.times[n] for n in ((BASE, AGAIN) if name == BASE else (name,)) if n in series.times]
    p50, p95, p99 = percentiles(np.concatenate(sessions, axis=1), rng)
    first = p50.ms if facts.decoder and spec.phase == "prefill" else None
    each = 1 if spec.phase == "denoise" else spec.shape.tokens
    rate = 1000 * spec.batch * each / p50.ms
    return ArmTimes(p50, p95, p99, rate, first, facts.memory.get(name), *_figures(ratio))
