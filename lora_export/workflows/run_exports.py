"""What a run exports: base and merged model with one graph, and the unmerged one that is measured beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import (
    AdapterChoice,
    BenchmarkResult,
    BudgetSearch,
    MergeResult,
    Progress,
    Source,
    StoryOptions,
)
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.progress import Silent
from lora_export.workflows.beside import Later
from lora_export.workflows.budget import Models, Pair, within_budget
from lora_export.workflows.run_graphs import Control, control_of, export_as, export_merged, merge_into
from lora_export.workflows.shared_base import SharedBase, base_of, measured_before

if TYPE_CHECKING:
    from lora_export.contracts import TensorSource
    from lora_export.merging import MergePlan


@dataclass(frozen=True)
class Told:
    """What a run is told: its inputs, the plan of its merge, its options, and the base where it shares one."""

    base: Source
    adapters: Sequence[AdapterChoice]
    planned: "MergePlan"
    options: StoryOptions
    shared: SharedBase


@dataclass(frozen=True)
class Run:
    """A run at work. told: with the seed of its validation; folder: the merged model, or an outline of it; alone:
    the base without an adapter beside it; trained_on: makes the base that the adapter belongs to, once."""

    told: Told
    stage: Path
    work: Path
    folder: Path
    alone: Path
    trained_on: Callable[[], Path]
    worker: Worker


def export_both(run: Run, merged: MergeResult | None, progress: Progress) -> tuple[MergeResult, Pair]:
    """The base and the merged model with one graph; merged in the same pass, if it was not before."""
    from lora_export.merging import written_source

    told, folder, worker, how = run.told, run.folder, run.worker, run.told.options.export
    source = written_source(merged) if merged is not None else None
    where, what = run.work / "base", "the base, to compare with"
    base_onnx = base_of(
        told.shared,
        lambda: export_as(run.trained_on(), where, how, progress, what, calibrated_on=source, worker=worker),
    )
    if merged is not None:
        exported = export_merged(base_onnx, folder, run.stage / "onnx", how, progress, source, worker)
        return merged, Pair(base_onnx, exported)
    merged, exported = merge_into(
        base_onnx, told.base.folder, told.adapters, folder, run.stage, told.options, progress, worker
    )
    return merged, Pair(base_onnx, exported)


def to_measure(run: Run, exports: Later[tuple[MergeResult, Pair]], progress: Progress) -> Control | BenchmarkResult:
    """The unmerged model's graph, to be measured beside the others; or what was measured of the same graph."""
    told, merged = run.told, exports.result()[1].merged
    measured = measured_before(told.shared, merged)
    if measured is not None:
        return measured
    return control_of(
        run.trained_on(), run.alone, told.adapters, run.work, told.options, merged, progress, run.worker
    )


def with_more_bits(
    run: Run, merged: MergeResult, first: Pair, dequantized: Path | None, progress: Progress
) -> tuple[Pair, BudgetSearch]:
    """`first`, or exports with more bits, as the share or size that the run asks for takes."""
    from lora_export.merging import begin_stream, plan, written_source

    told, numbers = run.told, run.work / "numbers"
    if told.options.merged_folder:
        source: TensorSource = written_source(merged)
    else:
        source = begin_stream(plan(told.base.folder, told.adapters, told.options.merge), numbers, Silent())
    models = Models(run.trained_on(), run.folder, source, run.work, run.stage / "onnx")
    return within_budget(models, first, run.alone, told.adapters, dequantized, told.options, progress)
