"""The benchmark's story: open the arms, measure cell by cell, judge."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_export import runtime
from lora_export.benchmark import environment
from lora_export.benchmark.cells import AGAIN, BASE, MERGED, UNMERGED, Task, conclude
from lora_export.benchmark.measure import measure
from lora_export.benchmark.sessions import Buffers, Engine, Shape, misplaced
from lora_export.benchmark.statistics import overall
from lora_export.contracts import BenchmarkOptions, BenchmarkResult, Cell, Phase, Progress
from lora_export.errors import RuntimeUnavailable
from lora_export.files import read_json

_MAX_STRAYS_TOLD = 10
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


@dataclass
class Study:
    """What one run holds on to while it goes from cell to cell. steps: the graphs of a decoder's step, where they
    are not the same as those of a prompt."""

    models: Mapping[str, Path]
    steps: Mapping[str, Path]
    provider: str
    threads: int
    options: BenchmarkOptions
    progress: Progress
    notes: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    samples: dict[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def run(
    *,
    merged: Path,
    base: Path | None,
    unmerged: Path | None,
    options: BenchmarkOptions,
    progress: Progress,
    identity: tuple[bool, tuple[str, ...]] | None = None,
    steps: tuple[Path, Path | None] | None = None,
) -> BenchmarkResult:
    """Compare the latency of ONNX graphs in one process, side by side.

    merged is judged against base; unmerged is the positive control. identity: whether the optimised graphs of
    base and merged are the same, and where they differ, found out by the caller. steps: of an encoder-decoder, the
    graphs of merged and base that decode a token; merged and base are then its encoders. Raises RuntimeUnavailable
    if the provider does not work here, InputError for a graph with inputs that it cannot make up.
    """
    started = time.perf_counter()
    before = environment.snapshot()
    options, cut = _fitting(options, merged.with_name("config.json"))
    study = Study(
        models=_models(merged, base, unmerged),
        steps=_models(*steps, None) if steps else {},
        provider=runtime.resolve_provider(options.provider),
        threads=environment.usable_cores(),
        options=options,
        progress=progress,
    )
    progress.stage(f"benchmark on {study.provider}")
    if cut:
        study.note(cut)
    if base is None:
        study.note("without a base there is nothing to compare with: the times of the merged graph alone")
    verified = _verify_placement(study)
    _measure_all(study)
    floors = [c.noise_floor for c in study.cells if c.noise_floor is not None]
    return BenchmarkResult(
        provider=study.provider,
        provider_verified=verified,
        cells=tuple(study.cells),
        noise_floor=max(floors, default=None),
        graph_identical=identity[0] if identity else None,
        verdict=overall([c.verdict for c in study.cells]),
        seconds=time.perf_counter() - started,
        environment=_environment(study, before),
        graph_differences=identity[1] if identity else (),
        notes=tuple(study.notes),
        samples=study.samples,
    )


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
    if most < 1 or max(options.prompts) <= most:
        return options, ""
    prompts = tuple(dict.fromkeys(min(n, most) for n in options.prompts))
    cut = f"prompts of at most {most} tokens: config.json knows {most + 4} positions"
    return replace(options, prompts=prompts), cut


def _models(merged: Path, base: Path | None, unmerged: Path | None) -> dict[str, Path]:
    paths = {BASE: base, AGAIN: base, MERGED: merged, UNMERGED: unmerged}
    return {name: path for name, path in paths.items() if path is not None}


def _environment(study: Study, before: dict[str, Any]) -> dict[str, Any]:
    fixed = {"intra_op_threads": study.threads, "margin": study.options.margin, "seed": study.options.seed}
    return {**environment.describe(), **fixed, "before": before, "after": environment.snapshot()}


# --- where the nodes run -----------------------------------------------------------------------------------


def _verify_placement(study: Study) -> bool:
    """Profile one run of every graph where some of it could silently run on the CPU instead."""
    if study.provider == "cpu":
        return True  # a session with the CPU alone has nowhere else to go; _open checks that it is alone
    study.progress.detail("checking where every node runs")
    batch, prompt = study.options.batches[0], study.options.prompts[0]
    clean = True
    arms = [(name, model, Shape(batch, 0, prompt)) for name, model in study.models.items()]
    arms += [(name, model, Shape(batch, prompt, 1)) for name, model in study.steps.items()]
    for name, model, shape in arms:
        if name == AGAIN:
            continue
        found = misplaced(model, study.provider, study.threads, shape)
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
    parts = [(models, cuda_graph) for cuda_graph in modes for models in (study.models, study.steps) if models]
    deadline: float | None = None
    for position, (models, cuda_graph) in enumerate(parts):
        engines = _open_for(study, models, cuda_graph)
        if not engines:
            continue
        tasks = _tasks(study.options, _phases(study, models, engines), cuda_graph)
        # Loading a model is not measuring: the clock starts with the first cell.
        deadline = deadline or time.perf_counter() + study.options.max_seconds
        for i, task in enumerate(tasks):
            left = len(tasks) - i + len(tasks) * (len(parts) - position - 1)
            seconds = max(0.0, deadline - time.perf_counter()) / left
            _measure_cell(study, task, engines, seconds, i + 1, rng)


def _phases(study: Study, models: Mapping[str, Path], engines: Mapping[str, Engine]) -> tuple[Phase, ...]:
    if models is study.steps:
        return ("decode",)
    return ("prefill", "decode") if engines[MERGED].is_decoder else ("prefill",)


def _tasks(options: BenchmarkOptions, phases: tuple[Phase, ...], cuda_graph: bool) -> list[Task]:
    return [
        Task(batch, prompt, phase, cuda_graph)
        for batch in options.batches
        for prompt in options.prompts
        for phase in phases
    ]


def _open_for(study: Study, models: Mapping[str, Path], cuda_graph: bool) -> dict[str, Engine]:
    """All arms, or none if CUDA graphs are asked for and the merged graph cannot be captured."""
    engines: dict[str, Engine] = {}
    for name, model in models.items():
        if name == AGAIN and not _fits_twice(model):
            study.note("memory holds one session of the base only: the noise floor is that session against itself")
            engines[AGAIN] = engines[BASE]
            continue
        study.progress.detail(f"loading {name}" + (" for CUDA graphs" if cuda_graph else ""))
        try:
            engines[name] = _open(study, model, cuda_graph)
        except RuntimeUnavailable as error:
            if not cuda_graph:
                raise  # but a graph that cannot be captured is no failure
            study.note(f"no CUDA graph of {name}: {_first_line(error)}")
            if name != UNMERGED:
                return {}
    return engines


def _open(study: Study, model: Path, cuda_graph: bool) -> Engine:
    engine = Engine(model, study.provider, study.threads, cuda_graph=cuda_graph)
    wanted, found = runtime.PROVIDERS[study.provider], engine.session.get_providers()
    if study.provider == "cpu" and found != [wanted]:
        raise RuntimeUnavailable(
            f"the session runs on {', '.join(found)}",
            where=model,
            expected=wanted,
            next_step="lora-export env",
        )
    return engine


def _fits_twice(model: Path) -> bool:
    size = sum(p.stat().st_size for p in model.parent.glob(f"{model.name}*"))
    return environment.available_memory() > 3 * size


def _measure_cell(
    study: Study,
    task: Task,
    engines: dict[str, Engine],
    seconds: float,
    number: int,
    rng: np.random.Generator,
) -> None:
    study.progress.detail(f"measuring {task.key} for up to {seconds:.0f} s")
    arms = _arms(study, task, engines, graph_id=number)
    if MERGED not in arms or (BASE in engines and not {BASE, AGAIN} <= arms.keys()):
        return
    pairs = ((AGAIN, (BASE,)), (MERGED, (BASE, AGAIN))) if AGAIN in arms else ()
    series = measure(
        arms,
        pairs=pairs,
        margin=study.options.margin,
        seconds=seconds,
        rng=rng,
        tick=study.progress.advance,
    )
    if not series.settled:
        study.note(f"{task.key}: latency still drifted by more than the margin when warm-up ended")
    cell, reason = conclude(task, series, study.options.margin, rng)
    if reason:
        study.note(f"{task.key}: {reason}")
    study.cells.append(cell)
    study.samples[task.key] = {n: tuple(float(x) for x in t.ravel()) for n, t in series.times.items()}


def _arms(study: Study, task: Task, engines: dict[str, Engine], graph_id: int) -> dict[str, Callable[[], float]]:
    buffers = Buffers(engines[MERGED].device)
    arms: dict[str, Callable[[], float]] = {}
    for name, engine in engines.items():
        # The same session twice needs the same captured graph, so the same call.
        twin = next((n for n in arms if engines[n] is engine), None)
        if twin:
            arms[name] = arms[twin]
            continue
        try:
            call = engine.call(task.shape, buffers, graph_id, study.options.seed)
            call()  # the capture run
        except Exception as error:
            if not task.cuda_graph:
                raise
            study.note(f"{task.key}: no CUDA graph of {name}: {_first_line(error)}")
            continue
        arms[name] = call
    return arms


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
