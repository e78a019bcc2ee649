"""The whole story: an adapter and its base go in, a proven merged model and its ONNX export come out."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export import manifest
from lora_export.allowed import check_adapter_folder
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.contracts import (
    AdapterChoice,
    BenchmarkResult,
    BudgetSearch,
    Progress,
    Source,
    Story,
    StoryOptions,
    ValidationResult,
)
from lora_export.contracts.option import kept
from lora_export.errors import GateFailed
from lora_export.progress import Silent
from lora_export.storage.disk import check_space
from lora_export.storage.files import output_folder
from lora_export.workflows.bare_base import without_adapter
from lora_export.workflows.base_cache import base_for, use_of
from lora_export.workflows.budget import Models, Pair, searches, with_budget, within_budget
from lora_export.workflows.exporting import knowing_touched
from lora_export.workflows.held_out import asked_calibrations, refuse_calibrated, refuse_other_calibration
from lora_export.workflows.latency import measure_run, refuse_extra, refuse_slower
from lora_export.workflows.pipelines.story import plan_story, tell_pipeline
from lora_export.workflows.run_graphs import control_of, export_as, export_merged, like_earlier, merge_into
from lora_export.workflows.run_report import write_report
from lora_export.workflows.shared_base import SharedBase, base_of, measured_once, stand_in_once
from lora_export.workflows.trained_base import modules_from, prepared_base
from lora_export.workflows.validating import pair_of

if TYPE_CHECKING:
    from lora_export.merging import MergePlan


def merge_and_export(
    base: Source,
    adapters: Sequence[AdapterChoice],
    output: Path,
    options: StoryOptions,
    progress: Progress,
    shared: SharedBase | None = None,
) -> Story:
    """Merge, export, validate, benchmark, report. A gate that fails leaves everything in `output.failed`.

    shared: what was made of the base before, and is taken where the merged model has the base's graph.
    """
    options, images = with_provider(options), is_pipeline(base.folder)
    options = options if images else with_budget(options, base.folder)
    earlier = options.export.graph_from
    inputs = [base.folder, *(a.folder for a in adapters), *([earlier] if earlier else [])]
    pictures = plan_story(base, adapters, output, options) if images else None
    planned = None if images else _preflight(base, adapters, output, options, alone=shared is None)
    with output_folder(output, options.force, inputs=inputs) as stage:
        work = stage / ".work"
        work.mkdir()
        if planned is None:
            assert pictures is not None
            story = tell_pipeline(pictures, stage, work, options, progress)
        else:
            known = knowing_touched(options.export, base.folder, adapters, options.merge)
            told = Told(base, adapters, planned, replace(options, export=known))
            with base_for(shared, base, adapters, planned, told.options, progress) as found:
                story = _run(told, found, stage, work, progress)
                story = replace(story, cache=use_of(found, story))
        shutil.rmtree(work)
        story = _relocated(story, stage, output)
        write_report(story, stage, base, adapters, options)
        manifest.write(stage, base, adapters, kept(options))
        refuse_failed(story)
    return story


@dataclass(frozen=True)
class Told:
    """What a run is told: its inputs, the plan of its merge, its options."""

    base: Source
    adapters: Sequence[AdapterChoice]
    planned: "MergePlan"
    options: StoryOptions


def with_provider(options: StoryOptions) -> StoryOptions:
    """With the provider that really runs a model here in all stages, and the precision of an earlier export."""
    from lora_export.runtime import resolve_provider

    export = replace(options.export, provider=resolve_provider(options.export.provider))
    validation = replace(options.validation, provider=export.provider, merge=options.merge)
    return replace(options, export=like_earlier(export), validation=validation)


def _run(told: Told, shared: SharedBase, stage: Path, work: Path, progress: Progress) -> Story:
    from lora_export.merging import merge_planned, written_source
    from lora_export.validation import validate
    from lora_export.validation.run import seeded

    # merge, and export with the graph of the base
    base, adapters = told.base, told.adapters
    options = replace(told.options, validation=seeded(told.options.validation, shared.seed))
    folder = stage / "merged" if options.merged_folder else work / "outline"
    merged = merge_planned(told.planned, folder, progress, force=False) if options.merged_folder else None
    alone = without_adapter(base.folder, work)
    trained_on = cache(partial(prepared_base, alone, adapters, options.merge, work, progress))
    source = written_source(merged) if merged is not None else None
    where, what = work / "base", "the base, to compare with"
    base_onnx = base_of(
        shared,
        lambda: export_as(trained_on(), where, options.export, progress, what, calibrated_on=source),
    )
    if merged is not None:
        exported = export_merged(base_onnx, folder, stage / "onnx", options.export, progress, source)
    else:
        merged, exported = merge_into(base_onnx, base.folder, adapters, folder, stage, options, progress)
    asked = alone, folder, options.merge, options.validation.max_memory
    dequantized = stand_in_once(shared, *asked, work, progress)
    pair, budget = Pair(base_onnx, exported), None
    if searches(options, base.folder):
        models = Models(trained_on(), folder, source, work, stage / "onnx")
        pair, budget = _within_budget(models, pair, base, alone, adapters, dequantized, options, progress)

    # prove
    checked = validate(
        alone,
        adapters,
        folder,
        exports=[pair_of(pair.merged, pair.base.output)],
        dequantized=dequantized,
        graphs_alone=not options.merged_folder,
        options=options.validation,
        known=shared.known,
        progress=progress,
    )
    story = Story(stage, merged, validate=checked, export=pair.merged, budget=budget)
    if not checked.passed:
        return story

    # measure, unless the same graph was
    def measure() -> BenchmarkResult:
        control = control_of(trained_on(), alone, adapters, work, options, pair.merged, progress)
        return measure_run(pair.base, pair.merged, control, options, progress)

    return replace(story, benchmark=measured_once(shared, pair.base, pair.merged, measure))


def _within_budget(
    models: Models,
    first: Pair,
    base: Source,
    alone: Path,
    adapters: Sequence[AdapterChoice],
    dequantized: Path | None,
    options: StoryOptions,
    progress: Progress,
) -> tuple[Pair, BudgetSearch]:
    """`first`, or exports with more bits, as the share or size that the run asks for takes."""
    from lora_export.merging import begin_stream, plan

    if models.source is None:
        numbers = begin_stream(plan(base.folder, adapters, options.merge), models.work / "numbers", Silent())
        models = replace(models, source=numbers)
    return within_budget(models, first, alone, adapters, dequantized, options, progress)


def _preflight(
    base: Source, adapters: Sequence[AdapterChoice], output: Path, options: StoryOptions, *, alone: bool
) -> "MergePlan":
    """The plan of the merge. Refuse everything that headers and config.json show, before minutes of work."""
    from lora_export.merging import plan
    from lora_export.onnx_export import check_request
    from lora_export.onnx_export.embedders import as_exported
    from lora_export.validation.comparing.texts import read_prompts, read_text

    export = options.export
    read_prompts(options.validation.prompts)
    read_text(options.validation.text)
    refuse_other_calibration(export)
    refuse_calibrated(asked_calibrations(export), options.validation)
    for folder in (base.folder, *(a.folder for a in adapters)):
        check_adapter_folder(folder)
    planned = plan(base.folder, adapters, options.merge)
    wanted = {**planned.base.config, **(planned.config_changes if planned.model else {})}
    config = {k: v for k, v in wanted.items() if k not in planned.config_removals}
    config = as_exported(config, modules_from(base.folder, adapters))
    check_request(config, export.precision, export.provider, export.engine, export.quantization)
    refuse_extra(options.extra_arms, adapters, export.precision, options.merge.combine)
    # merged, and the graphs of merged, base and unmerged, and perhaps the dequantized base; fp32 at most. With a
    # shared base the graph of merged alone.
    widest = max(planned.nbytes, planned.nbytes * 4 // {"float16": 2, "bfloat16": 2}.get(planned.dtype, 4))
    folders = 2 if options.merged_folder else 1
    check_space(output.absolute().parent, planned.nbytes * folders + widest * (3 if alone else 1))
    return planned


def _relocated(story: Story, stage: Path, output: Path) -> Story:
    """The same results with the paths that the run will have when it is renamed."""
    assert story.export is not None
    moved = replace(
        story.merge,
        output=output / story.merge.output.relative_to(stage),
        certificate=output / story.merge.certificate.relative_to(stage),
    )
    return replace(story, output=output, merge=moved, export=replace(story.export, output=output / "onnx"))


# --- gates ---------------------------------------------------------------------------------------------------


def refuse_failed(story: Story) -> None:
    """Raise GateFailed for the first gate that did not pass; the report has the details."""
    if story.validate is not None and not story.validate.passed:
        lost = _only_survival_failed(story.validate)
        raise GateFailed(
            "validation failed: " + failures(story.validate),
            where=story.output.with_name(story.output.name + ".failed"),
            tensor=next(iter(_suspects(story.validate)), None),
            expected="an export that keeps the adapter's effect"
            if lost
            else "a merged model that computes what the unmerged one computes",
            next_step=story.validate.advice[-1] if lost else "read report/report.html in that folder",
        )
    if story.benchmark is not None:
        refuse_slower(story.benchmark, story.output, "report/report.html")


def _suspects(result: ValidationResult) -> tuple[str, ...]:
    """Tensors at fault: those of the first module that goes wrong, then all others."""
    return (*(result.deviation.tensors if result.deviation else ()), *result.weight_errors)


def _only_survival_failed(result: ValidationResult) -> bool:
    return bool(result.advice) and all(
        c.passed or c.name.endswith(("adapter_survival", "_kl")) for c in result.checks
    )


def failures(result: ValidationResult) -> str:
    """The failed checks in one line (name, value and threshold), and the first module that goes wrong."""
    failed = [
        f"{c.name} is {c.value:.4g}" + (f", allowed {c.threshold:.4g}" if c.threshold is not None else "")
        for c in result.checks
        if not c.passed
    ]
    where = [f"the first module that differs is {result.deviation.module}"] if result.deviation else []
    return "; ".join([*failed, *where])
