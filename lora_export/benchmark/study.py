"""The benchmark's story: open the arms, measure cell by cell, judge."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_export import runtime
from lora_export.benchmark import environment
from lora_export.benchmark.buffers import Shape
from lora_export.benchmark.cells import AGAIN, BASE, DELAYED, MERGED, Facts, Task, conclude
from lora_export.benchmark.conditions import Conditions, summarized, unsteady
from lora_export.benchmark.engines import Engines
from lora_export.benchmark.gpus import Gpus
from lora_export.benchmark.measure import measure
from lora_export.benchmark.sessions import misplaced
from lora_export.benchmark.statistics import overall
from lora_export.contracts import (
    BenchmarkArm,
    BenchmarkOptions,
    BenchmarkResult,
    Cell,
    GraphComparison,
    Phase,
    Progress,
)
from lora_export.errors import InputError
from lora_export.files import read_json

_MAX_STRAYS_TOLD = 10
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


@dataclass
class Study:
    """What one run holds on to while it goes from cell to cell."""

    arms: Mapping[str, BenchmarkArm]
    provider: str
    threads: int
    options: BenchmarkOptions
    progress: Progress
    gpus: Gpus
    graph: GraphComparison | None = None
    notes: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    samples: dict[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    readings: dict[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def parts(self) -> int:
        """How many graphs the model has."""
        return len(self.arms[MERGED].graphs)


def run(
    arms: Sequence[BenchmarkArm],
    *,
    options: BenchmarkOptions,
    progress: Progress,
    graph: GraphComparison | None = None,
) -> BenchmarkResult:
    """Compare the latency of ONNX graphs in one process, side by side.

    arms: merged, and base, with which all others are compared, then whatever else is to be measured. unmerged or
    plugged are the positive control; without either, the base held up by two margins is. graph: whether the
    optimised graphs of base and merged are the same, found out by the caller. Raises RuntimeUnavailable if the
    provider does not work here, InputError for arms that are missing or twice there, or graphs with inputs that
    it cannot make up.
    """
    started = time.perf_counter()
    named = _named(arms)
    options, cut = _fitting(options, named[MERGED].graphs[0].with_name("config.json"))
    study = Study(
        arms=named,
        provider=runtime.resolve_provider(options.provider),
        threads=environment.usable_cores(),
        options=options,
        progress=progress,
        gpus=Gpus(),
        graph=graph,
    )
    progress.stage(f"benchmark on {study.provider}")
    if cut:
        study.note(cut)
    if BASE not in named:
        study.note("without a base there is nothing to compare with: the times of the merged graph alone")
    verified = _verify_placement(study)
    _measure_all(study)
    floors = [c.noise_floor for c in study.cells if c.noise_floor is not None]
    return BenchmarkResult(
        provider=study.provider,
        provider_verified=verified,
        cells=tuple(study.cells),
        noise_floor=max(floors, default=None),
        graph_identical=graph.identical if graph else None,
        verdict=overall([c.verdict for c in study.cells]),
        seconds=time.perf_counter() - started,
        environment=_environment(study),
        graph=graph,
        notes=tuple(study.notes),
        samples=study.samples,
        conditions=study.readings,
    )


def _named(arms: Sequence[BenchmarkArm]) -> dict[str, BenchmarkArm]:
    """The arms by name, the base first and then a second session of it."""
    named = {arm.name: arm for arm in arms}
    if len(named) < len(arms) or MERGED not in named or named.keys() & {AGAIN, DELAYED}:
        raise InputError(
            f"the arms {', '.join(arm.name for arm in arms)}",
            expected=f"{MERGED}, each name once, and none called {AGAIN} or {DELAYED}",
        )
    if BASE not in named:
        return named
    return {BASE: named[BASE], AGAIN: named[BASE], **{n: a for n, a in named.items() if n != BASE}}


def _fitting(options: BenchmarkOptions, config: Path) -> tuple[BenchmarkOptions, str]:
    """Options with no prompt longer than the model has positions for, and a note if one was cut.

    config: the config.json beside the graph, which may not be there.
    """
    if not config.is_file():
        return options, ""
    settings = read_json(config)
    settings = settings.get("text_config") or settings
    known = [n for n in (settings.get(key) for key in _POSITIONS) if isinstance(n, int)]
    # RoBERTa begins to count after its padding id, OPT at 2; and a step needs a position, too.
    most = min(known, default=10**9) - 4
    if most < 1 or max(prompt for _, prompt in options.shapes) <= most:
        return options, ""
    shapes = tuple(dict.fromkeys((batch, min(prompt, most)) for batch, prompt in options.shapes))
    cut = f"prompts of at most {most} tokens: config.json knows {most + 4} positions"
    return replace(options, shapes=shapes), cut


def _environment(study: Study) -> dict[str, Any]:
    fixed = {"intra_op_threads": study.threads, "margin": study.options.margin, "seed": study.options.seed}
    blocks = {key: summarized(readings) for key, readings in study.readings.items()}
    return {**environment.describe(), **fixed, "blocks": blocks}


# --- where the nodes run -----------------------------------------------------------------------------------


def _verify_placement(study: Study) -> bool:
    """Profile one run of every graph where some of it could silently run on the CPU instead."""
    if study.provider == "cpu":
        return True  # a session with the CPU alone has nowhere else to go; Engines checks that it is alone
    study.progress.detail("checking where every node runs")
    batch, prompt = study.options.shapes[0]
    clean = True
    for name, arm in study.arms.items():
        if name == AGAIN:
            continue
        for part, graph in enumerate(arm.graphs[: study.parts]):
            shape = Shape.of("decode" if part else "prefill", batch, prompt)
            found = misplaced(graph, study.provider, study.threads, shape, arm.adapter)
            clean = clean and not found
            for stray in found[:_MAX_STRAYS_TOLD]:
                study.note(f"{name}: {stray}")
            if len(found) > _MAX_STRAYS_TOLD:
                study.note(f"{name}: and {len(found) - _MAX_STRAYS_TOLD} more nodes elsewhere")
    return clean


# --- measuring ---------------------------------------------------------------------------------------------


def _measure_all(study: Study) -> None:
    """Cells share the time: what one leaves over, the next ones may use."""
    rng = np.random.default_rng(study.options.seed)
    modes = (False, True) if study.provider == "cuda" else (False,)
    # Of several graphs, the first reads the input and the last does a step.
    parts = [(part, cuda_graph) for cuda_graph in modes for part in sorted({0, study.parts - 1})]
    deadline: float | None = None
    for position, (part, cuda_graph) in enumerate(parts):
        engines = _opened(study, part, cuda_graph)
        if engines is None:
            continue
        tasks = _tasks(study.options, _phases(part, engines), cuda_graph)
        # Loading a model is not measuring: the clock starts with the first cell.
        deadline = deadline or time.perf_counter() + study.options.seconds
        for i, task in enumerate(tasks):
            left = len(tasks) - i + len(tasks) * (len(parts) - position - 1)
            seconds = max(0.0, deadline - time.perf_counter()) / left
            cell = _measure_cell(study, task, engines, seconds, i + 1, rng)
            if cell and cell.verdict == "slower" and study.graph and study.graph.identical:
                del engines  # memory may not hold them twice
                engines = _opened(study, part, cuda_graph)
                if engines is None:
                    break
                cell = _confirmed(cell, _measure_cell(study, task, engines, seconds, i + 1, rng))
            if cell:
                study.cells.append(cell)
                if cell.reason:
                    study.note(f"{task.key}: {cell.reason}")


def _opened(study: Study, part: int, cuda_graph: bool) -> Engines | None:
    """Sessions of every arm that has this part; None where base and merged cannot be had with CUDA graphs."""
    arms = {n: a for n, a in study.arms.items() if len(a.graphs) > part or a.pytorch}
    engines = Engines(study.provider, study.threads, cuda_graph, study.note, study.progress.detail, study.gpus)
    return engines if engines.open(arms, part) else None


def _confirmed(first: Cell, again: Cell | None) -> Cell | None:
    """A cell that was slower although its graph is the base's, after a second measurement in other sessions.

    Two sessions of one graph can differ by where their memory and their threads came to lie, for as long as they
    are open. A model that is slower stays so in other sessions.
    """
    if again is None or again.verdict == "slower":
        return again
    return replace(
        again,
        verdict="inconclusive",
        reason=f"the graphs are identical, and merged was slower in one pair of sessions (ratio {first.ratio:.4f}) "
        f"and {again.verdict} in another ({again.ratio:.4f}): it is the sessions that differ, on a machine that is "
        "not quiet",
    )


def _phases(part: int, engines: Engines) -> tuple[Phase, ...]:
    if part:
        return ("decode",)
    return ("prefill", "decode") if engines.is_decoder else ("prefill",)


def _tasks(options: BenchmarkOptions, phases: tuple[Phase, ...], cuda_graph: bool) -> list[Task]:
    return [Task(batch, prompt, phase, cuda_graph) for batch, prompt in options.shapes for phase in phases]


def _measure_cell(
    study: Study, task: Task, engines: Engines, seconds: float, number: int, rng: np.random.Generator
) -> Cell | None:
    """What was found, with its samples kept in the study; None if base or merged could not be captured."""
    study.progress.detail(f"measuring {task.key} for up to {seconds:.0f} s")
    bound = engines.bind(task, number, study.options.seed, study.options.margin)
    if MERGED not in bound or (BASE in study.arms and not {BASE, AGAIN} <= bound.keys()):
        return None
    if not bound[MERGED].kv_in_place and task.phase == "decode" and engines.is_decoder:
        study.note("steps copy the cache: this graph cannot write into it")
    series = measure(
        {name: call.run for name, call in bound.items()},
        pairs=((AGAIN, (BASE,)), (MERGED, (BASE, AGAIN))) if AGAIN in bound else (),
        margin=study.options.margin,
        seconds=seconds,
        rng=rng,
        tick=study.progress.advance,
        observe=Conditions(study.gpus).read,
        apart=[name for name, call in bound.items() if call.disturbs],
    )
    if not series.settled:
        study.note(f"{task.key}: latency still drifted by more than the margin when warm-up ended")
    for text in unsteady(series.readings):
        study.note(f"{task.key}: {text}")
    facts = Facts(engines.is_decoder, bound[MERGED].kv_in_place, dict(engines.memory))
    study.samples[task.key] = {n: tuple(float(x) for x in t.ravel()) for n, t in series.times.items()}
    study.readings[task.key] = series.readings
    return conclude(task, series, study.options.margin, rng, facts)
