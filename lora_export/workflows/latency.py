"""The latency of a merged model: the arms that it is compared with, the identity of their graphs, the benchmark."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lora_export.allowed import check_model_folder
from lora_export.choices import ExtraArm
from lora_export.contracts import (
    AdapterChoice,
    BenchmarkArm,
    BenchmarkOptions,
    BenchmarkResult,
    ExportResult,
    Progress,
    StoryOptions,
)
from lora_export.errors import ExportError, GateFailed, InputError
from lora_export.onnx_export import model_files
from lora_export.onnx_export.graphs.slots import SUFFIX
from lora_export.storage.files import output_folder
from lora_export.workflows.run_graphs import Control
from lora_export.workflows.run_report import new_report

RESERVED = ("base", "merged", "unmerged", "plugged", "pytorch")


def benchmark(arms: Sequence[BenchmarkArm], options: BenchmarkOptions, progress: Progress) -> BenchmarkResult:
    """Measure the latency of the arms side by side in one process.

    First, compare the optimized graphs of base and merged for the provider that they will run on.
    """
    from lora_export.benchmarking import run
    from lora_export.onnx_export.graphs.identity import compare

    named = {arm.name: arm for arm in arms}
    graph = None
    if "base" in named:
        progress.stage("benchmark: comparing the optimized graphs of base and merged")
        graph = compare(named["base"].graphs, named["merged"].graphs, options.provider)
        for warning in graph.warnings:
            progress.warn(warning)
    progress.stage(f"benchmark: {', '.join(named)} in one process")
    return run(arms, options=options, progress=progress, graph=graph)


def measure_run(
    base: ExportResult, merged: ExportResult, control: Control, options: StoryOptions, progress: Progress
) -> BenchmarkResult:
    """The arms of a run side by side: both exports, the unmerged graph if there is one, and what it asks for."""
    arms = [BenchmarkArm("base", base.paths), BenchmarkArm("merged", merged.paths)]
    arms += [BenchmarkArm("unmerged", control.export.paths)] if control.export else []
    graph = control.export.model if control.export else None
    extra, without = extra_arms(options.extra_arms, graph, control.trained_on, control.adapters, progress)
    how = replace(options.benchmark, provider=options.export.provider)
    measured = benchmark([*arms, *extra], how, progress)
    return replace(measured, notes=(*measured.notes, *control.why_not, *without))


def refuse_slower(result: BenchmarkResult, output: Path, report: str) -> None:
    """GateFailed if merged is slower. output: the folder that is not written then; report: the page in it."""
    if result.verdict == "slower":
        raise GateFailed(
            "the merged model is slower than the base",
            where=output.with_name(output.name + ".failed"),
            expected="a ratio whose interval lies within the margin",
            next_step=f"read {report} in that folder; measure again on a quiet machine",
        )


def benchmark_folder(
    arms: Sequence[BenchmarkArm],
    output: Path,
    options: BenchmarkOptions,
    progress: Progress,
    *,
    force: bool = False,
) -> BenchmarkResult:
    """Measure what lies on disk, and write a report and every raw sample into the new folder `output`.

    GateFailed if merged is slower: then everything is in `output.failed`.
    """
    from lora_export.onnx_export import check_export
    from lora_export.report import write
    from lora_export.runtime import resolve_provider

    options = replace(options, provider=resolve_provider(options.provider))
    graphs = [path for arm in arms for path in arm.graphs]
    for path in graphs:
        check_export(path.parent, [path.name])
    for model in (folder for arm in arms for folder in arm.pytorch or ()):
        check_model_folder(model)
    inputs = [*(p.parent for p in graphs), *(folder for arm in arms for folder in arm.pytorch or ())]
    with output_folder(output, force, inputs=inputs) as stage:
        result = benchmark(arms, options, progress)
        report = new_report("benchmark", {"benchmark": asdict(options) | {"arms": [arm.name for arm in arms]}})
        write(replace(report, status="failed" if result.verdict == "slower" else "passed", benchmark=result), stage)
        refuse_slower(result, output, "report.html")
    return result


# --- arms from what lies on disk -----------------------------------------------------------------------------


def arms_of(
    merged: Path,
    base: Path | None,
    unmerged: Path | None,
    plugged: Path | None,
    pytorch: tuple[Path, Path] | None,
    beside: Sequence[tuple[str, Path]],
) -> tuple[BenchmarkArm, ...]:
    """An arm for each ONNX folder or file that is given. InputError if they cannot be compared.

    plugged: a folder that `export -a` wrote with one adapter, or one of its .onnx_adapter files; pytorch: base and
    adapter; beside: other graphs of the same model, with names of their own.
    """
    arms = [BenchmarkArm("base", model_files(base))] if base else []
    arms.append(BenchmarkArm("merged", model_files(merged)))
    if unmerged:
        arms.append(BenchmarkArm("unmerged", _without_slots(unmerged)))
    if plugged:
        arms.append(_plugged(plugged))
    if pytorch:
        arms.append(BenchmarkArm("pytorch", pytorch=pytorch))
    for name, folder in beside:
        if name in (a.name for a in arms) or name in RESERVED or not name.isidentifier():
            raise InputError(
                f"the arm cannot be named {name!r}",
                expected=f"an identifier that is not in use and not one of {', '.join(RESERVED)}",
                next_step="--beside optimum=FOLDER",
            )
        arms.append(BenchmarkArm(name, model_files(folder)))
    _refuse_other_kind([a for a in arms if a.graphs])
    return tuple(arms)


def _without_slots(unmerged: Path) -> tuple[Path, ...]:
    graphs = model_files(unmerged)
    if _adapters(graphs[0].parent):
        raise InputError(
            "this graph computes the base until an adapter is plugged in",
            where=graphs[0].parent,
            expected="an unmerged graph with the adapter in it",
            next_step="--plugged in place of -u, or lora-export export --unmerged -a ADAPTER",
        )
    return graphs


def _plugged(path: Path) -> BenchmarkArm:
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else _adapters(folder)
    if len(files) != 1:
        raise InputError(
            f"the folder holds {len(files)} adapters to plug in",
            where=folder,
            expected="one .onnx_adapter file",
            next_step="name the file: --plugged FOLDER/NAME.onnx_adapter"
            if files
            else "write one with lora-export export -m BASE -a ADAPTER -o FOLDER",
        )
    return BenchmarkArm("plugged", model_files(folder), adapter=files[0])


def _adapters(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _refuse_other_kind(arms: Sequence[BenchmarkArm]) -> None:
    """Arms with another number of graphs are other kinds of models."""
    counts = {len(arm.graphs) for arm in arms}
    if len(counts) > 1:
        raise InputError(
            f"exports with {' and '.join(map(str, sorted(counts)))} graphs",
            where=next(arm for arm in arms if len(arm.graphs) == max(counts)).graphs[0].parent,
            expected="exports of one model, made the same way",
        )


# --- arms of a run -------------------------------------------------------------------------------------------


def refuse_extra(
    extra: Sequence[ExtraArm], adapters: Sequence[AdapterChoice], precision: str, combine: str = "none"
) -> None:
    """InputError for arms that this run cannot have, before any work."""
    from lora_export.workflows.pluggable import PRECISIONS

    for name in extra:
        if combine != "none":
            raise InputError(f"--arm {name} with --combine {combine}", expected="one adapter, not combined")
        if len(adapters) != 1 or adapters[0].weight != 1.0:
            weights = ", ".join(f"{adapter.weight:g}" for adapter in adapters) or "none"
            raise InputError(f"--arm {name} with adapter weights {weights}", expected="one adapter of weight 1")
        if name == "plugged" and precision not in PRECISIONS:
            raise InputError(f"--arm plugged with --precision {precision}", expected=", ".join(PRECISIONS))


def plugged_beside(unmerged: Path, base: Path, adapter: Path) -> BenchmarkArm:
    """The unmerged graph with slots in place of its LoRA, in the same folder and on the same weights.

    unmerged: its .onnx file. ExportError if the adapter has no place in it.
    """
    from lora_export.workflows.pluggable import plug

    graph = unmerged.with_name("plugged.onnx")
    shutil.copyfile(unmerged, graph)
    return BenchmarkArm("plugged", (graph,), adapter=plug(graph, base, adapter))


def extra_arms(
    extra: Sequence[ExtraArm],
    unmerged: Path | None,
    base: Path,
    adapters: Sequence[AdapterChoice],
    progress: Progress,
) -> tuple[tuple[BenchmarkArm, ...], tuple[str, ...]]:
    """The extra arms that were requested, and a note for each that is not possible. unmerged: its .onnx file, which
    all of them need."""
    arms, notes = [], []
    for name in extra:
        if unmerged is None:
            notes.append(f"no arm {name}: there is no unmerged graph of this model")
        elif name == "pytorch":
            arms.append(BenchmarkArm("pytorch", pytorch=(base, adapters[0].folder)))
        else:
            try:
                arms.append(plugged_beside(unmerged, base, adapters[0].folder))
            except ExportError as error:
                progress.warn(f"no arm plugged: {error.found}")
                notes.append(f"no arm plugged: {error.found}")
    return tuple(arms), tuple(notes)
