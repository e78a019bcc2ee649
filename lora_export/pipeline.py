"""The whole story: an adapter and its base go in, a proven merged model and its ONNX export come out."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_export import manifest
from lora_export.allowed import check_adapter_folder
from lora_export.checkpoint.sources import choices_of
from lora_export.contracts import (
    AdapterChoice,
    BenchmarkArm,
    Progress,
    Source,
    Story,
    StoryOptions,
)
from lora_export.storage.disk import check_space
from lora_export.storage.files import output_folder
from lora_export.workflows.bare_base import without_adapter
from lora_export.workflows.gates import refuse_failed
from lora_export.workflows.latency import benchmark, extra_arms, refuse_extra
from lora_export.workflows.run_graphs import export_as, export_merged, export_unmerged, like_earlier, merge_into
from lora_export.workflows.run_report import options_json, write_report
from lora_export.workflows.trained_base import prepared_base, stand_in
from lora_export.workflows.validating import pair_of


def merge_and_export(
    base: Source,
    adapters: Sequence[tuple[Source, float]],
    output: Path,
    options: StoryOptions,
    progress: Progress,
) -> Story:
    """Merge, export, validate, benchmark, report. A gate that fails leaves everything in `output.failed`."""
    from lora_export.runtime import resolve_provider

    export = like_earlier(replace(options.export, provider=resolve_provider(options.export.provider)))
    options = replace(options, export=export)
    choices = choices_of(adapters)
    inputs = [base.folder, *(c.folder for c in choices), *([export.graph_from] if export.graph_from else [])]
    _preflight(base, choices, output, options)
    with output_folder(output, options.force, inputs=inputs) as stage:
        work = stage / ".work"
        work.mkdir()
        story = _run(base, choices, stage, work, options, progress)
        shutil.rmtree(work)
        story = _relocated(story, stage, output)
        write_report(story, stage, base, adapters, options)
        manifest.write(stage, base, adapters, options_json(options))
        refuse_failed(story)
    return story


def _run(
    base: Source,
    adapters: Sequence[AdapterChoice],
    stage: Path,
    work: Path,
    options: StoryOptions,
    progress: Progress,
) -> Story:
    from lora_export.merging import merge
    from lora_export.validation import validate
    from lora_export.validation.reference.foreign import as_peft

    folder = stage / "merged" if options.merged_folder else work / "outline"
    merged = merge(base.folder, adapters, folder, options.merge, progress) if options.merged_folder else None
    alone = without_adapter(base.folder, work)
    trained_on = prepared_base(alone, adapters, options.merge, work, progress)
    base_onnx = export_as(trained_on, work / "base", options.export, progress, "the base, to compare with")
    if merged is not None:
        exported = export_merged(base_onnx, folder, stage / "onnx", options.export, progress)
    else:
        merged, exported = merge_into(base_onnx, base.folder, adapters, folder, stage, options, progress)
    readable = as_peft(alone, adapters, work)
    unmerged_onnx, why_not = export_unmerged(trained_on, readable, work, options, exported, progress)
    story = Story(stage, merged, exported)

    checked = validate(
        alone,
        adapters,
        folder,
        exports=[pair_of(exported, base_onnx.output)],
        dequantized=stand_in(alone, folder, options.merge, options.validation.max_memory, work, progress),
        graphs_alone=not options.merged_folder,
        options=replace(options.validation, merge=options.merge, provider=options.export.provider),
        progress=progress,
    )
    story = replace(story, validate=checked)
    if not checked.passed:
        return story

    arms = [BenchmarkArm("base", base_onnx.paths), BenchmarkArm("merged", exported.paths)]
    if unmerged_onnx:
        arms.append(BenchmarkArm("unmerged", unmerged_onnx.paths))
    unmerged_graph = unmerged_onnx.model if unmerged_onnx else None
    extra, without = extra_arms(options.extra_arms, unmerged_graph, trained_on, readable, progress)
    measured = benchmark([*arms, *extra], replace(options.benchmark, provider=options.export.provider), progress)
    return replace(story, benchmark=replace(measured, notes=(*measured.notes, *why_not, *without)))


def _preflight(base: Source, choices: Sequence[AdapterChoice], output: Path, options: StoryOptions) -> None:
    """Everything that can be refused on headers and config, before minutes of work."""
    from lora_export.merging import plan
    from lora_export.onnx_export import check_request
    from lora_export.validation.comparing.prompts import read_prompts
    from lora_export.validation.comparing.text import read_text

    read_prompts(options.validation.prompts)
    read_text(options.validation.text)
    for folder in (base.folder, *(c.folder for c in choices)):
        check_adapter_folder(folder)
    planned = plan(base.folder, choices, options.merge)
    wanted = {**planned.base.config, **(planned.config_changes if planned.model else {})}
    config = {k: v for k, v in wanted.items() if k not in planned.config_removals}
    export = options.export
    check_request(config, export.precision, export.provider, export.engine, export.quantization)
    refuse_extra(options.extra_arms, choices, export.precision, options.merge.combine)
    # merged, and the graphs of merged, base and unmerged, and perhaps the dequantized base; fp32 at most
    widest = max(planned.nbytes, planned.nbytes * 4 // _width(planned.dtype))
    folders = 2 if options.merged_folder else 1
    check_space(output.absolute().parent, planned.nbytes * folders + widest * 3)


def _width(dtype: str) -> int:
    return {"float16": 2, "bfloat16": 2}.get(dtype, 4)


def _relocated(story: Story, stage: Path, output: Path) -> Story:
    """The same results with the paths that the run will have when it is renamed."""
    assert story.export is not None
    moved = replace(
        story.merge,
        output=output / story.merge.output.relative_to(stage),
        certificate=output / story.merge.certificate.relative_to(stage),
    )
    return replace(story, output=output, merge=moved, export=replace(story.export, output=output / "onnx"))
