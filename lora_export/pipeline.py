"""The whole story: an adapter and its base go in, a proven merged model and its ONNX export come out."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export import manifest
from lora_export.allowed import check_adapter_folder
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.contracts import (
    AdapterChoice,
    Progress,
    Source,
    Story,
    StoryOptions,
    ValidationResult,
)
from lora_export.contracts.option import kept
from lora_export.errors import GateFailed
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.storage.disk import check_space
from lora_export.storage.files import output_folder
from lora_export.workflows.bare_base import without_adapter
from lora_export.workflows.base_cache import base_for, use_of
from lora_export.workflows.beside import Beside, Later, fits
from lora_export.workflows.budget import searches, with_budget
from lora_export.workflows.exporting import knowing_touched
from lora_export.workflows.held_out import asked_calibrations, refuse_calibrated, refuse_other_calibration
from lora_export.workflows.latency import measure_run, refuse_extra, refuse_slower
from lora_export.workflows.pipelines.story import plan_story, tell_pipeline
from lora_export.workflows.proving import WARM
from lora_export.workflows.run_exports import Run, Told, export_both, to_measure, with_more_bits
from lora_export.workflows.run_graphs import Control, like_earlier
from lora_export.workflows.run_report import write_report
from lora_export.workflows.shared_base import SharedBase, keep_measured, stand_in_once
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
    *,
    side_by_side: bool = True,
) -> Story:
    """Merge, export, validate, benchmark, report. A gate that fails leaves everything in `output.failed`.

    shared: what was made of the base before, and is taken where the merged model has the base's graph;
    side_by_side: whether exports are made while models are compared, where there are cores and memory for it.
    """
    images, earlier = is_pipeline(base.folder), options.export.graph_from
    inputs = [base.folder, *(a.folder for a in adapters), *([earlier] if earlier else [])]
    with Worker() as worker:
        if side_by_side and shared is None and earlier is None and not images:
            worker.warm(*WARM)  # while the merge is planned and done
        options = with_provider(options)
        options = options if images else with_budget(options, base.folder)
        pictures = plan_story(base, adapters, output, options) if images else None
        planned = None if images else _preflight(base, adapters, output, options, alone=shared is None)
        with output_folder(output, options.force, inputs=inputs) as stage:
            work = stage / ".work"
            work.mkdir()
            if planned is None:
                assert pictures is not None
                story = tell_pipeline(pictures, stage, work, options, progress)
            else:
                touched = knowing_touched(options.export, base.folder, adapters, options.merge)
                known = replace(options, export=touched)
                at_once = side_by_side and fits(_in_fp32(planned), options.validation.max_memory)
                with (
                    base_for(shared, base, adapters, planned, known, progress) as found,
                    Beside(progress, worker.kill, at_once=at_once) as beside,
                ):
                    story = _run(Told(base, adapters, planned, known, found), stage, work, worker, beside)
                    story = replace(story, cache=use_of(found, story))
            shutil.rmtree(work)
            story = _relocated(story, stage, output)
            write_report(story, stage, base, adapters, options)
            manifest.write(stage, base, adapters, kept(options))
            refuse_failed(story)
    return story


def with_provider(options: StoryOptions) -> StoryOptions:
    """With the provider that really runs a model here in all stages, and the precision of an earlier export."""
    from lora_export.runtime import resolve_provider

    export = replace(options.export, provider=resolve_provider(options.export.provider))
    validation = replace(options.validation, provider=export.provider, merge=options.merge)
    return replace(options, export=like_earlier(export), validation=validation)


def _run(told: Told, stage: Path, work: Path, worker: Worker, beside: Beside) -> Story:
    from lora_export.merging import merge_planned
    from lora_export.validation import prepare, validate
    from lora_export.validation.run import seeded

    # merge
    base, adapters, shared, progress = told.base, told.adapters, told.shared, beside.progress
    options = replace(told.options, validation=seeded(told.options.validation, shared.seed))
    folder = stage / "merged" if options.merged_folder else work / "outline"
    merged = merge_planned(told.planned, folder, progress, force=False) if options.merged_folder else None
    alone = without_adapter(base.folder, work)
    trained_on = cache(partial(prepared_base, alone, adapters, options.merge, work, progress))
    run = Run(replace(told, options=options), stage, work, folder, alone, trained_on, worker)

    # export with the graph of the base, and later the unmerged model, while models are compared
    if shared.export is None:
        trained_on()
    elif shared.measured is not None:
        worker.cool()
    exports = beside.begin(partial(export_both, run, merged))
    asked = alone, folder, options.merge, options.validation.max_memory
    dequantized = stand_in_once(shared, *asked, work, progress)
    budget = None
    if searches(options, base.folder):
        pair, budget = with_more_bits(run, *exports.result(), dequantized, progress)
        made = exports.result()[0], pair
        exports = Later(lambda: made)
    elif merged is None:
        exports.result()  # the outline is written with them
    prepare()
    control = beside.begin(partial(to_measure, run, exports), spare=True)

    # prove
    checked = validate(
        alone,
        adapters,
        folder,
        exports=Later(lambda: pair_of(exports.result()[1].merged, exports.result()[1].base.output)),
        dequantized=dequantized,
        graphs_alone=not options.merged_folder,
        options=options.validation,
        known=shared.known,
        progress=progress,
    )
    merged, pair = exports.result()
    story = Story(stage, merged, validate=checked, export=pair.merged, budget=budget)
    if not checked.passed:
        return story

    # measure, unless the same graph was
    measured = control.result()
    worker.close()
    if isinstance(measured, Control):
        measured = measure_run(pair.base, pair.merged, measured, options, progress)
        keep_measured(shared, pair.base, pair.merged, measured)
    return replace(story, benchmark=measured)


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
    folders = 2 if options.merged_folder else 1
    check_space(output.absolute().parent, planned.nbytes * folders + _in_fp32(planned) * (3 if alone else 1))
    return planned


def _in_fp32(planned: "MergePlan") -> int:
    """Bytes of the merged model in fp32, at most."""
    return max(planned.nbytes, planned.nbytes * 4 // {"float16": 2, "bfloat16": 2}.get(planned.dtype, 4))


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
