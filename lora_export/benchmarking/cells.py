"""One cell of the benchmark: what is to be measured, and what its timings say."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_export.benchmarking.buffers import Shape
from lora_export.benchmarking.measure import Series
from lora_export.benchmarking.statistics import Interval, judge, percentiles
from lora_export.choices import Phase, Verdict
from lora_export.contracts import ArmTimes, Cell

BASE, AGAIN, MERGED, UNMERGED, PLUGGED, DELAYED = "base", "base_again", "merged", "unmerged", "plugged", "delayed"
CONTROLS = (UNMERGED, PLUGGED, DELAYED)  # the first of them that is there must be found slower
DELAY = 2.0  # margins by which the base is held up where nothing else does more work than it


@dataclass(frozen=True)
class Task:
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
class Facts:
    """What is known of a cell besides its timings. decoder: a prompt's call ends with the first new token's logits;
    kv_in_place: as in Cell; memory: arm → bytes."""

    decoder: bool
    kv_in_place: bool
    memory: Mapping[str, int]


def conclude(task: Task, series: Series, margin: float, rng: np.random.Generator, facts: Facts) -> Cell:
    """The cell, with a reason in words where its verdict needs one.

    Two sessions of one graph differ by where their memory came to lie, so every arm is compared with the mean of
    both sessions of the base, and the difference between those two is the noise floor.
    """
    merged_ms = series.median(MERGED)
    assert merged_ms is not None
    compared = {BASE, AGAIN} <= series.times.keys()
    ratios: dict[str, Interval] = {}
    if compared:
        others = [name for name in series.times if name not in (BASE, AGAIN)]
        ratios = {name: series.against(name, BASE, AGAIN, rng=rng) for name in others}
        ratios[AGAIN] = series.against(AGAIN, BASE, rng=rng)
    control = next((name for name in CONTROLS if name in ratios), None)
    verdict: Verdict = "inconclusive"
    reason = ""
    if compared:
        shown = ratios[control] if control else None
        verdict, reason = judge(
            ratios[MERGED], ratios[AGAIN], shown, series.blocks, margin, control or "", series.sessions
        )
    merged, unmerged = ratios.get(MERGED), ratios.get(UNMERGED)
    return Cell(
        batch=task.batch,
        prompt=task.prompt,
        phase=task.phase,
        cuda_graph=task.cuda_graph,
        base_ms=series.median(BASE, AGAIN),
        merged_ms=merged_ms,
        unmerged_ms=series.median(UNMERGED),
        ratio=merged.ratio if merged else None,
        ci_low=merged.low if merged else None,
        ci_high=merged.high if merged else None,
        verdict=verdict,
        noise_floor=ratios[AGAIN].half_width if compared else None,
        unmerged_ratio=unmerged.ratio if unmerged else None,
        unmerged_ci_low=unmerged.low if unmerged else None,
        unmerged_ci_high=unmerged.high if unmerged else None,
        pairs=series.blocks,
        sessions=series.sessions,
        kv_in_place=facts.kv_in_place,
        control=control,
        reason=reason,
        arms={
            name: _times(task, series, name, ratios.get(name), facts, rng) for name in series.times if name != AGAIN
        },
    )


def _times(
    task: Task, series: Series, name: str, ratio: Interval | None, facts: Facts, rng: np.random.Generator
) -> ArmTimes:
    """Both sessions of the base count as one arm."""
    sessions = [series.times[n] for n in ((BASE, AGAIN) if name == BASE else (name,)) if n in series.times]
    p50, p95, p99 = percentiles(np.concatenate(sessions, axis=1), rng)
    prompt = facts.decoder and task.phase == "prefill"
    return ArmTimes(
        p50=p50,
        p95=p95,
        p99=p99,
        tokens_per_second=1000 * task.batch * task.shape.tokens / p50.ms,
        first_token_ms=p50.ms if prompt else None,
        memory_bytes=facts.memory.get(name),
        ratio=ratio.ratio if ratio else None,
        ci_low=ratio.low if ratio else None,
        ci_high=ratio.high if ratio else None,
    )
