"""A benchmark from beginning to end: name the arms, see where their nodes run, measure cell by cell, sum up."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_export import runtime
from lora_export.benchmarking import environment
from lora_export.benchmarking.buffers import Shape
from lora_export.benchmarking.cells import AGAIN, BASE, DELAYED, MERGED
from lora_export.benchmarking.conditions import summarized
from lora_export.benchmarking.gpus import Gpus
from lora_export.benchmarking.sessions import misplaced
from lora_export.benchmarking.statistics import overall
from lora_export.benchmarking.study import Study, measure_all
from lora_export.choices import GRIDS, Shapes
from lora_export.contracts import (
    BenchmarkArm,
    BenchmarkOptions,
    BenchmarkResult,
    Environment,
    GraphComparison,
    Progress,
)
from lora_export.errors import InputError
from lora_export.storage.sealed import read_json

_EARLY = (
    "the optimized graphs of base and merged are identical, so only a merged model that is measured slower could "
    "change the verdict: each cell's measurement ended once it was not slower, and --max-time measures until the "
    "noise allows a test"
)
_MOST_STRAYS = 10  # of each graph that are noted
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


def run(
    arms: Sequence[BenchmarkArm],
    *,
    options: BenchmarkOptions,
    progress: Progress,
    graph: GraphComparison | None = None,
) -> BenchmarkResult:
    """Compare the latency of ONNX graphs in one process, side by side.

    arms: merged, and base, with which all others are compared, then whatever else is to be measured. unmerged or
    plugged are the positive control; without either, the base delayed by two margins is. graph: the caller's
    comparison of the optimized graphs of base and merged. Raises RuntimeUnavailable if the provider does not work
    here, InputError for arms that are missing or duplicated, or graphs with inputs that it cannot generate.
    """
    started = time.perf_counter()
    named = _named(arms)
    shapes, grid = shapes_of(options, alike=BASE not in named or (graph is not None and graph.identical))
    shapes, cut = _fitting(shapes, [arm.graphs[0].with_name("config.json") for arm in arms if arm.graphs])
    study = Study(
        arms=named,
        provider=runtime.resolve_provider(options.provider),
        threads=environment.usable_cores(),
        options=replace(options, shapes=shapes),
        shapes=shapes,
        progress=progress,
        gpus=Gpus(),
        graph=graph,
    )
    progress.stage(f"benchmark on {study.provider}")
    for text in (grid, cut):
        if text:
            study.note(text)
    if BASE not in named:
        study.note("no base to compare with: the times are those of the merged graph alone")
    verified = _verify_placement(study)
    measure_all(study)
    verdict = overall([c.verdict for c in study.cells])
    early = study.checks and verdict == "equivalent_by_structure"
    if early:
        study.note(_EARLY)
    floors = [c.noise_floor for c in study.cells if c.noise_floor is not None]
    return BenchmarkResult(
        provider=study.provider,
        provider_verified=verified,
        cells=tuple(study.cells),
        noise_floor=max(floors, default=None),
        graph_identical=graph.identical if graph else None,
        verdict=verdict,
        seconds=time.perf_counter() - started,
        environment=_environment(study),
        graph=graph,
        ended_early=early,
        notes=tuple(study.notes),
        graph_differences=graph.differences if graph else (),
        samples=study.samples,
        conditions=study.readings,
    )


def _named(arms: Sequence[BenchmarkArm]) -> dict[str, BenchmarkArm]:
    """The arms by name, with a second session of the base after merged."""
    named = {arm.name: arm for arm in arms}
    if len(named) < len(arms) or MERGED not in named or named.keys() & {AGAIN, DELAYED}:
        raise InputError(
            f"these arms cannot be compared: {', '.join(arm.name for arm in arms)}",
            expected=f"{MERGED}, no name twice, and neither {AGAIN} nor {DELAYED}",
        )
    if BASE not in named:
        return named
    return {BASE: named[BASE], MERGED: named[MERGED], AGAIN: named[BASE], **named}


def shapes_of(options: BenchmarkOptions, *, alike: bool) -> tuple[Shapes, str]:
    """What is measured, and a note of it where nobody asked for it. alike: merged has no work of its own, which
    could be slow in some shapes only."""
    if options.shapes is not None:
        return options.shapes, ""
    if alike:
        return GRIDS["quick"], ""
    return GRIDS["standard"], "grid standard: graphs that differ can be slower at some batch sizes or lengths only"


def _fitting(shapes: Shapes, configs: Sequence[Path]) -> tuple[Shapes, str]:
    """Shapes with no prompt longer than any of the models has positions for, and a note if one was cut.

    configs: the config.json beside each graph, which may not be there.
    """
    settings = [read_json(config) for config in configs if config.is_file()]
    texts = [s.get("text_config") or s for s in settings]
    known = [n for n in (text.get(key) for text in texts for key in _POSITIONS) if isinstance(n, int)]
    # RoBERTa begins to count after its padding id, OPT at 2; and a step needs a position, too.
    most = min(known, default=10**9) - 4
    if most < 1 or max(prompt for _, prompt in shapes) <= most:
        return shapes, ""
    fitting = tuple(dict.fromkeys((batch, min(prompt, most)) for batch, prompt in shapes))
    return fitting, f"prompts were cut to {most} tokens: the model has {most + 4} positions"


def _environment(study: Study) -> Environment:
    return Environment(
        **vars(environment.describe()),
        intra_op_threads=study.threads,
        margin=study.options.margin,
        seed=study.options.seed,
        blocks={key: summarized(readings) for key, readings in study.readings.items()},
    )


# --- where the nodes run -----------------------------------------------------------------------------------


def _verify_placement(study: Study) -> bool:
    """Profile one run of every graph, as parts of it could silently run on the CPU."""
    if study.provider == "cpu":
        return True  # OpenedArms checks that the CPU is the only provider of the session
    study.progress.detail("checking where every node runs")
    batch, prompt = study.shapes[0]
    clean = True
    for name, arm in study.arms.items():
        if name == AGAIN:
            continue
        for part, graph in enumerate(arm.graphs[: study.parts]):
            shape = Shape.of("decode" if part else "prefill", batch, prompt)
            strays = misplaced(graph, study.provider, study.threads, shape, arm.adapter)
            clean = clean and not strays
            more = len(strays) - _MOST_STRAYS
            for stray in [*strays[:_MOST_STRAYS], *([f"and {more} more nodes elsewhere"] if more > 0 else [])]:
                study.note(f"{name}: {stray}")
    return clean
