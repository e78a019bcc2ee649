"""The whole story of a pipeline of images: its models merged, exported and proven, the denoiser's step measured."""

import copy
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.contracts import (
    AdapterChoice,
    BenchmarkResult,
    ExportedPipeline,
    ExportOptions,
    ExportResult,
    Pipeline,
    PipelineFacts,
    Progress,
    Source,
    Story,
    StoryOptions,
    StyleAdapter,
)
from lora_export.errors import ExportError
from lora_export.storage.disk import check_space
from lora_export.workflows.pipelines.measuring import (
    Loaded,
    measure,
    own_side,
    refuse_without_denoiser,
    with_pictures,
)

if TYPE_CHECKING:
    from lora_export.merging.pipelines.planning import PipelinePlan

PICTURES = Path("report", "pictures")
PYTORCH, PYTORCH_BASE = "pytorch", "pytorch_base"  # arms: the unmerged denoiser, and the base's


def plan_story(
    base: Source, adapters: Sequence[AdapterChoice], output: Path, options: StoryOptions
) -> "PipelinePlan":
    """What the merge will do; refuses everything that options, headers and configurations show."""
    from lora_export.merging.pipelines.planning import plan_pipeline
    from lora_export.onnx_export.diffusion.pipeline_export import check_earlier, check_pipeline
    from lora_export.workflows.pipelines.validating import adapters_beside

    refuse_text_options(options)
    planned = plan_pipeline(base.folder, adapters, options.merge)
    refuse_without_denoiser(planned.pipeline)
    adapters_beside(planned)
    if options.export.graph_from is not None:
        check_earlier(options.export.graph_from, planned.pipeline)
    check_pipeline(planned.pipeline, options.export)
    # merged, and the graphs of base and merged; fp32 at most
    check_space(output.absolute().parent, planned.nbytes * (1 + 2 * 2))
    return planned


def refuse_text_options(options: StoryOptions) -> None:
    """InputError for options that are about language models."""
    from lora_export.workflows.pipelines.validating import refuse_given

    validation = options.validation
    given = {
        "--max-size": options.max_size is not None,
        "--min-survival": validation.min_survival is not None,
        "--prompts": validation.prompts is not None,
        "--text": validation.text is not None,
        "--arm plugged": "plugged" in options.extra_arms,
        "--no-merged-folder": not options.merged_folder,
    }
    refuse_given(given, "options that pipelines have: lora-export merge-and-export --help names them")


def tell_pipeline(
    planned: "PipelinePlan", stage: Path, work: Path, options: StoryOptions, progress: Progress
) -> Story:
    """Merge, export with one set of graphs, prove, measure. Everything that stays goes into `stage`."""
    from lora_export.checkpoint.pipeline import open_pipeline
    from lora_export.merging.pipelines.merging import merge_planned_pipeline
    from lora_export.validation.pipelines import validate_pipeline
    from lora_export.workflows.pipelines.validating import adapters_beside

    base = planned.pipeline
    # merge, and export with the graphs of the base
    merge = merge_planned_pipeline(planned, stage / "merged", progress, force=False)
    merged = open_pipeline(stage / "merged")
    base_onnx = _exported(base, work / "base", options.export, progress, "the base, to compare with")
    export = _with_graphs_of(base_onnx, merged, stage / "onnx", options.export, progress)
    story = Story(stage, merge, export=export, pipeline=facts_of(planned))

    # prove
    pictures = stage / PICTURES if base.class_name is not None else None  # a denoiser alone paints none
    if pictures is not None:
        pictures.mkdir(parents=True)
    checked = validate_pipeline(
        base,
        adapters_beside(planned),
        merged,
        exports=[ExportedPipeline(export.output, export.precision)],
        pictures=pictures,
        options=options.validation,
        progress=progress,
    )
    story = replace(story, validate=checked)
    if not checked.passed:
        return story

    # measure
    benchmark = replace(options.benchmark, provider=options.export.provider)
    side, pytorch = own_side(base), _in_pytorch(planned)
    measured = measure(base_onnx.output, export.output, benchmark, side, progress, pytorch)
    measured = with_pictures(told(measured), base_onnx.output, export.output, base.class_name, progress)
    return replace(story, benchmark=measured)


def _exported(
    pipeline: Pipeline, output: Path, options: ExportOptions, progress: Progress, what: str
) -> ExportResult:
    from lora_export.onnx_export.diffusion.pipeline_export import export_pipeline, reweight_pipeline
    from lora_export.workflows.proving import prover

    progress.stage(f"export: {what}")
    if options.graph_from is not None:
        return reweight_pipeline(options.graph_from, pipeline, output, progress=progress)
    own = replace(options, force=False)
    return export_pipeline(pipeline, output, own, prove=prover(options.proof), progress=progress)


def _with_graphs_of(
    earlier: ExportResult, merged: Pipeline, output: Path, options: ExportOptions, progress: Progress
) -> ExportResult:
    """The merged pipeline with the base's graphs; with its own where the merge changed more than weights."""
    from lora_export.onnx_export.diffusion.pipeline_export import reweight_pipeline

    progress.stage("export: the merged pipeline, with the graphs of the base")
    try:
        return reweight_pipeline(earlier.output, merged, output, progress=progress)
    except ExportError as error:
        if options.graph_from is not None:
            raise
        progress.detail(f"graphs of its own: {error.found}")
    return _exported(merged, output, options, progress, "the merged pipeline")


def _in_pytorch(planned: "PipelinePlan") -> Mapping[str, Loaded]:
    """Arms of the benchmark that PyTorch runs: the base's denoiser, and the same weights with the adapters' work
    beside its layers. None where the adapters do not change the denoiser."""
    denoiser = planned.pipeline.denoiser
    if denoiser is None or denoiser.name not in planned.components:
        return {}

    @functools.cache
    def base(device: str) -> Any:
        from lora_export.validation.pipelines.loading import load

        return load(denoiser, planned.options.variant).to(device)

    def unmerged(device: str) -> Any:
        from lora_export.validation.pipelines.injecting import inject
        from lora_export.workflows.pipelines.validating import adapters_beside

        weights = (*base(device).parameters(), *base(device).buffers())
        twin = copy.deepcopy(base(device), {id(one): one for one in weights})  # layers of its own, weights shared
        inject(twin, denoiser.name, adapters_beside(planned))
        return twin.to(device)

    return {PYTORCH_BASE: base, PYTORCH: unmerged}


def told(result: BenchmarkResult) -> BenchmarkResult:
    """With what merging saves where the unmerged denoiser can run: under PyTorch, which has both arms."""
    saved = []
    for cell in result.cells:
        arms = cell.arms
        if arms.keys() >= {PYTORCH, PYTORCH_BASE}:
            times = arms[PYTORCH].p50.ms / arms[PYTORCH_BASE].p50.ms
            saved.append(f"{cell.key}: under PyTorch in fp32, the unmerged step takes {times:.2f} times the base's")
    without = () if saved else ("no unmerged arm: the adapters do not change the denoiser",)
    return replace(result, notes=(*result.notes, *saved, *without))


def facts_of(planned: "PipelinePlan") -> PipelineFacts:
    """What the pipeline and its adapters are."""
    pipeline = planned.pipeline
    adapters = tuple(
        StyleAdapter(
            name=choice.folder.resolve().name,
            format=adapter.format,
            weight=choice.weight,
            modules=dict(Counter(m.component for m in adapter.modules)),
            kinds=dict(adapter.kinds),
            vectors=adapter.vectors,
            metadata=dict(adapter.metadata),
        )
        for choice, adapter in zip(planned.choices, planned.adapters, strict=True)
    )
    models = {name: part.class_name for name, part in pipeline.components.items()}
    return PipelineFacts(pipeline.class_name, models, adapters, planned.skipped)
