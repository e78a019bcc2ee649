"""One cell of the benchmark: what is to be measured, and what its timings say."""

from dataclasses import dataclass

import numpy as np

from lora_export.benchmark.measure import Series
from lora_export.benchmark.sessions import Shape
from lora_export.benchmark.statistics import Interval, judge
from lora_export.contracts import Cell, Phase, Verdict

BASE, AGAIN, MERGED, UNMERGED = "base", "base_again", "merged", "unmerged"


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


def conclude(task: Task, series: Series, margin: float, rng: np.random.Generator) -> tuple[Cell, str]:
    """The cell and, where the verdict needs one, a reason in words.

    Two sessions of one graph differ by where their memory came to lie, so the merged graph is compared with
    the mean of both sessions of the base, and the difference between those two is the noise floor.
    """
    merged_ms = series.median(MERGED)
    assert merged_ms is not None
    verdict: Verdict = "inconclusive"
    reason = ""
    ratio: Interval | None = None
    floor: Interval | None = None
    control: Interval | None = None
    if {BASE, AGAIN} <= series.times.keys():
        ratio = series.against(MERGED, BASE, AGAIN, rng=rng)
        floor = series.against(AGAIN, BASE, rng=rng)
        control = series.against(UNMERGED, BASE, AGAIN, rng=rng) if UNMERGED in series.times else None
        verdict, reason = judge(ratio, floor, control, series.blocks, margin)
    return Cell(
        batch=task.batch,
        prompt=task.prompt,
        phase=task.phase,
        cuda_graph=task.cuda_graph,
        base_ms=series.median(BASE, AGAIN),
        merged_ms=merged_ms,
        unmerged_ms=series.median(UNMERGED),
        ratio=ratio.ratio if ratio else None,
        ci_low=ratio.low if ratio else None,
        ci_high=ratio.high if ratio else None,
        verdict=verdict,
        noise_floor=floor.half_width if floor else None,
        unmerged_ratio=control.ratio if control else None,
        unmerged_ci_low=control.low if control else None,
        unmerged_ci_high=control.high if control else None,
        pairs=series.blocks,
    ), reason
