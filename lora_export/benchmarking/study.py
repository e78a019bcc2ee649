"""The cells of a study, one after another: open sets of sessions, measure, judge, check a doubtful verdict."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lora_export.benchmarking.arms import OpenedArms
from lora_export.benchmarking.cells import AGAIN, BASE, MERGED, CellFacts, CellSpec, conclude
from lora_export.benchmarking.conditions import Conditions, unsteady
from lora_export.benchmarking.gpus import Gpus
from lora_export.benchmarking.measure import Series, check, joined, measure
from lora_export.benchmarking.statistics import MIN_SESSIONS
from lora_export.choices import Phase, Shapes
from lora_export.contracts import BenchmarkArm, BenchmarkOptions, Cell, GraphComparison, Progress, Reading


@dataclass
class Study:
    """What one run holds on to while it goes from cell to cell."""

    arms: Mapping[str, BenchmarkArm]
    provider: str
    threads: int
    options: BenchmarkOptions
    shapes: Shapes
    progress: Progress
    gpus: Gpus
    graph: GraphComparison | None = None
    notes: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    samples: dict[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    readings: dict[str, tuple[Reading, ...]] = field(default_factory=dict)
    passes: dict[CellSpec, int] = field(default_factory=dict)  # of a block, the same in all sets of sessions

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def one_graph(self) -> bool:
        """Whether base and merged are known to be identical once optimized."""
        return self.graph is not None and self.graph.identical

    @property
    def checks(self) -> bool:
        """Whether a measurement ends as soon as merged does not look slower, as nothing else would say anything."""
        return self.one_graph and self.options.max_seconds is None and self.options.sessions == 1

    @property
    def parts(self) -> int:
        """How many graphs the model has."""
        return len(self.arms[MERGED].graphs)


@dataclass
class _Measured:
    """What the sets of sessions gave: of each cell a series for each set."""

    series: dict[CellSpec, list[Series]] = field(default_factory=dict)
    facts: dict[CellSpec, CellFacts] = field(default_factory=dict)

    def add(self, spec: CellSpec, series: Series, facts: CellFacts) -> None:
        self.series.setdefault(spec, []).append(series)
        self.facts.setdefault(spec, facts)  # memory is what the first set took: later ones find it free again


@dataclass
class _Clock:
    """The time for all cells, which starts with the first: loading a model is not measuring. turns: how often
    sessions are opened."""

    seconds: float
    turns: int
    deadline: float | None = None

    def share(self, cells: int, measured: int) -> float:
        """For the next cell, when so many of those of this turn are measured."""
        self.deadline = self.deadline or time.perf_counter() + self.seconds
        left = cells - measured + cells * (self.turns - 1)
        return max(0.0, self.deadline - time.perf_counter()) / max(1, left)


def measure_all(study: Study) -> None:
    """Cells share the time: what one leaves over, the next ones may use."""
    rng = np.random.default_rng(study.options.seed)
    modes = (False, True) if study.provider == "cuda" else (False,)
    # Of several graphs, the first reads the input and the last does a step.
    parts = [(part, cuda_graph) for cuda_graph in modes for part in sorted({0, study.parts - 1})]
    clock = _Clock(study.options.seconds, len(parts) * study.options.sessions)
    for part, cuda_graph in parts:
        measured = _Measured()
        for number in range(study.options.sessions):
            _measure_set(study, measured, part, cuda_graph, number, clock, rng)
        for spec, sets in measured.series.items():
            series = joined(sets)
            cell = conclude(spec, series, study.options.margin, rng, measured.facts[spec])
            if cell.verdict == "slower" and cell.sessions == 1 and study.one_graph:
                again = _Measured()
                alone = _Clock(study.options.seconds / (len(parts) * len(measured.series)), 1)
                _measure_set(study, again, part, cuda_graph, 1, alone, rng, only=spec)
                if spec in again.series:
                    series = joined(again.series[spec])
                    second = conclude(spec, series, study.options.margin, rng, again.facts[spec])
                    cell = _confirmed(cell, second)
            _keep(study, spec, cell, series)


def _measure_set(
    study: Study,
    measured: _Measured,
    part: int,
    cuda_graph: bool,
    number: int,
    clock: _Clock,
    rng: np.random.Generator,
    only: CellSpec | None = None,
) -> None:
    """Open the sessions for the time that is `number`, in another order each time, and measure all their cells.

    only: a cell whose first measurement is doubted, which is measured in full.
    """
    checks = study.checks and only is None
    arms = _opened(study, part, cuda_graph, number, rng, copies=checks)
    if arms is not None:
        specs = [only] if only else _specs(study.shapes, part, arms, cuda_graph)
        for i, spec in enumerate(specs):
            seconds = None if checks else clock.share(len(specs), i)
            result = _measure_cell(study, spec, arms, seconds, i + 1, rng)
            if result is not None:
                measured.add(spec, *result)
    clock.turns -= 1


def _opened(
    study: Study, part: int, cuda_graph: bool, number: int, rng: np.random.Generator, *, copies: bool
) -> OpenedArms | None:
    """Sessions of every arm that has this part; None where base and merged do not run as CUDA graphs.

    The first time, merged is opened between the two sessions of the base.
    """
    names = [n for n, a in study.arms.items() if len(a.graphs) > part or a.in_pytorch]
    if number:
        names = [names[i] for i in rng.permutation(len(names))]
    arms = OpenedArms(
        study.provider, study.threads, cuda_graph, study.note, study.progress.detail, study.gpus, copies=copies
    )
    return arms if arms.open({name: study.arms[name] for name in names}, part) else None


def _confirmed(first: Cell, again: Cell) -> Cell:
    """A cell that was slower although its graph is the base's, after a second measurement in other sessions.

    Two sessions of one graph can differ by where their memory and their threads came to lie, for as long as they
    are open. A model that is slower stays so in other sessions.
    """
    if again.verdict == "slower":
        return again
    return replace(
        again,
        verdict="inconclusive" if again.verdict == "inconclusive" else "equivalent_by_structure",
        reason=f"merged was slower in one pair of sessions (ratio {first.ratio:.4f}) and not in another "
        f"({again.ratio:.4f}): the sessions differ, not the graphs; --sessions {2 * MIN_SESSIONS} measures by "
        "how much",
    )


def _keep(study: Study, spec: CellSpec, cell: Cell, series: Series) -> None:
    if cell.reason:
        study.note(f"{spec.key}: {cell.reason}")
    if not series.settled:
        study.note(f"{spec.key}: latency still drifted by more than the margin when warm-up ended")
    for text in unsteady(series.readings):
        study.note(f"{spec.key}: {text}")
    study.cells.append(cell)
    study.samples[spec.key] = {n: tuple(float(x) for x in t.ravel()) for n, t in series.times.items()}
    study.readings[spec.key] = series.readings


def _specs(shapes: Shapes, part: int, arms: OpenedArms, cuda_graph: bool) -> list[CellSpec]:
    phases: tuple[Phase, ...] = ("decode",) if part else ("prefill", "decode") if arms.is_decoder else ("prefill",)
    phases = ("denoise",) if arms.is_denoiser else phases
    return [CellSpec(batch, prompt, phase, cuda_graph) for batch, prompt in shapes for phase in phases]


def _measure_cell(
    study: Study, spec: CellSpec, arms: OpenedArms, seconds: float | None, number: int, rng: np.random.Generator
) -> tuple[Series, CellFacts] | None:
    """What one set of sessions gives for a cell; None if base or merged could not be captured. seconds: None for a
    check."""
    words = f"checking {spec.key}" if seconds is None else f"measuring {spec.key} for up to {seconds:.0f} s"
    study.progress.detail(words)
    bound = arms.bind(spec, number, study.options.seed, study.options.margin)
    if MERGED not in bound or (BASE in study.arms and not {BASE, AGAIN} <= bound.keys()):
        return None
    if not bound[MERGED].kv_in_place and spec.phase == "decode" and arms.is_decoder:
        study.note("steps copy the KV cache, because this graph cannot write into it")
    calls = {name: call.run for name, call in bound.items()}
    apart = [name for name, call in bound.items() if call.disturbs]
    observe, tick = Conditions(study.gpus).read, study.progress.advance
    if seconds is None:
        series = check(
            calls, arm=MERGED, references=(BASE, AGAIN), rng=rng, tick=tick, observe=observe, apart=apart
        )
    else:
        series = measure(
            calls,
            pairs=((AGAIN, (BASE,)), (MERGED, (BASE, AGAIN))) if AGAIN in bound else (),
            margin=study.options.margin,
            seconds=seconds,
            rng=rng,
            tick=tick,
            observe=observe,
            apart=apart,
            passes=study.passes.get(spec),
        )
        study.passes[spec] = series.passes
    facts = CellFacts(
        arms.is_decoder,
        bound[MERGED].kv_in_place,
        dict(arms.memory),
        one_graph=study.one_graph,
        ended_early=seconds is None,
    )
    return series, facts
