"""The stages as functions, and the whole story: merge, validate, export, benchmark, package, merge_and_export."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.checkpoint.sources import Adapters, Model, adapter_choices, resolve
from lora_export.contracts import (
    BenchmarkOptions,
    BenchmarkResult,
    ExportOptions,
    ExportResult,
    MergeOptions,
    MergeResult,
    PackageOptions,
    PackageResult,
    Progress,
    Story,
    StoryOptions,
    ValidationOptions,
    ValidationResult,
)

if TYPE_CHECKING:
    from lora_export.merging import MergePlan
    from lora_export.merging.pipelines.planning import PipelinePlan
from lora_export.api.arguments import SILENT, File, Folder, as_path


def merge_and_export(
    base: Model,
    adapters: Adapters,
    output: Folder,
    options: StoryOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> Story:
    """Merge, export to ONNX, validate against the unmerged model, benchmark, and write a report.

    Args:
        base: Folder of the base model, or a Hub ID such as `owner/name@revision`.
        adapters: One adapter or a sequence of them: each a folder or a Hub ID, with its weight behind it as in
            "A:0.7", or in a tuple (adapter, weight).
        output: New folder, all or nothing: `merged/`, `onnx/`, `report/`, `manifest.json`.
        options: The options of all stages.
        progress: Receives stages, details, warnings and how far a stage is.

    Returns:
        The results of all stages.

    Raises:
        GateFailed: A gate did not pass; everything is in `output.failed`, and nothing in `output`.
        LoraExportError: Refused or failed before, with nothing written.
    """
    from lora_export import pipeline

    choices = adapter_choices(adapters)
    return pipeline.merge_and_export(resolve(base), choices, Path(output), options or StoryOptions(), progress)


def merge(
    base: Model,
    adapters: Adapters,
    output: Folder,
    options: MergeOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> MergeResult:
    """Merge adapters into base weights: W' = round(f(W)), in fp32 or float64, rounded once, streamed.

    Args:
        base: Folder of safetensors, or a Hub ID; 4- and 8-bit weights are dequantized as training saw them. Or a
            pipeline of diffusers, a folder with model_index.json, whose adapters may be single files.
        adapters: One adapter or several, as for `merge_and_export`; none: a quantized base is only dequantized.
        output: New folder, all or nothing, which transformers or diffusers loads as it is, with a certificate.
        options: Which base, type, memory and combination; `max_memory` and `max_shard_size` in bytes.
        progress: Receives stages, warnings, and tensors done.

    Returns:
        Counts of tensors, the share of the change that survived rounding (1: all), peak memory in bytes, seconds.

    Raises:
        AdapterError: The adapter does not fit, or cannot be merged at all.
        CheckpointError: A file is damaged, unsafe or not understood.
        OutputError: The output exists, is held by another process, or does not fit on the disk.
    """
    from lora_export.checkpoint.pipeline import is_pipeline
    from lora_export.merging import merge as merge_folder
    from lora_export.merging.pipelines.merging import merge_pipeline

    choices, folder, how = adapter_choices(adapters), resolve(base).folder, options or MergeOptions()
    if is_pipeline(folder):
        return merge_pipeline(folder, choices, Path(output), how, progress)
    return merge_folder(folder, choices, Path(output), how, progress)


def plan(base: Model, adapters: Adapters, options: MergeOptions | None = None) -> "MergePlan | PipelinePlan":
    """What `merge` would do, from headers alone: the plan that `--dry-run` prints.

    Args:
        base: Folder of safetensors, or a Hub ID.
        adapters: One adapter or several, as for `merge_and_export`.
        options: Those of the merge.

    Returns:
        Each tensor of the output with what happens to it, shards, and changes of config.json; of a pipeline a plan
        for each component that changes.

    Raises:
        LoraExportError: What `merge` would refuse before it computes.
    """
    from lora_export.checkpoint.pipeline import is_pipeline
    from lora_export.merging import plan as plan_merge
    from lora_export.merging.pipelines.planning import plan_pipeline

    folder = resolve(base).folder
    planned = plan_pipeline if is_pipeline(folder) else plan_merge
    return planned(folder, adapter_choices(adapters), options or MergeOptions())


def validate(
    base: Model,
    adapters: Adapters,
    merged: Folder,
    *,
    onnx: Sequence[Folder] = (),
    base_onnx: Sequence[Folder] = (),
    own_texts: Sequence[File] = (),
    options: ValidationOptions | None = None,
    progress: Progress = SILENT,
) -> ValidationResult:
    """Compare a merged folder, and exports of it, with PEFT's unmerged forward in fp32, and each tensor in float64.

    The certificate of the merged folder says how it was merged. Options of the merge that are given besides must
    agree with it; they are needed only for a folder without a certificate, which another tool merged.

    Args:
        base: Folder or Hub ID of the model that the adapter was trained on.
        adapters: What was merged, with the same weights.
        merged: The merged folder.
        onnx: Exports of it in different precisions.
        base_onnx: The base exported in the same ways and order; without them it is exported anew, and deleted.
        own_texts: A text for each adapter, on which is measured what the merged model has kept of its effect.
        options: Inputs, tolerance (in noise floors), and the options of the merge.
        progress: Receives stages and warnings.

    Returns:
        Every check with its value, threshold and origin; `passed` says whether all held. Logits are differences of
        largest absolute value, KL is in nats, perplexities are per token.

    Raises:
        InputError: The folders do not belong together, an option contradicts the certificate, or an input cannot be
            read.
    """
    from lora_export.checkpoint.pipeline import is_pipeline
    from lora_export.workflows.validating import validate_folder

    source = resolve(base)
    if is_pipeline(source.folder):
        from lora_export.workflows.pipelines.validating import validate_pipeline_folder

        beside = [Path(p) for p in (*base_onnx, *own_texts)]
        how, graphs = options or ValidationOptions(), [Path(p) for p in onnx]
        return validate_pipeline_folder(
            source.folder, adapter_choices(adapters), Path(merged), graphs, how, progress, beside
        )
    return validate_folder(
        source,
        adapter_choices(adapters),
        Path(merged),
        [Path(p) for p in onnx],
        [Path(p) for p in base_onnx],
        options or ValidationOptions(),
        progress,
        [Path(p) for p in own_texts],
    )


def export(
    model: Model,
    output: Folder,
    *,
    adapters: Adapters = (),
    options: ExportOptions | None = None,
    progress: Progress = SILENT,
) -> ExportResult:
    """Export a model folder to ONNX.

    Args:
        model: Folder or Hub ID.
        output: New folder, all or nothing.
        adapters: One LoRA or several that stay outside of the weights, as `.onnx_adapter` files; with
            `options.unmerged`, the one that becomes operators of the graph.
        options: Precision, provider, engine, quantization, and an earlier export whose graph is reused.
        progress: Receives stages and details.

    Returns:
        Engine, precision, nodes, seconds, and file sizes in bytes.

    Raises:
        ExportError: No engine takes this architecture in this precision, or the graph did not check.
        InputError: Arguments do not go together.
    """
    from lora_export.workflows.exporting import check_export, export_model

    options = options or ExportOptions()
    count = 1 if isinstance(adapters, str | Path) or not isinstance(adapters, Sequence) else len(adapters)
    check_export(count, options)  # before a hub is asked
    return export_model(resolve(model), Path(output), adapter_choices(adapters), options, progress)


def benchmark(
    merged: Folder | File,
    output: Folder,
    *,
    base: Folder | File | None = None,
    unmerged: Folder | File | None = None,
    plugged: Folder | File | None = None,
    pytorch: tuple[Model, Model] | None = None,
    beside: Sequence[tuple[str, Folder | File]] = (),
    options: BenchmarkOptions | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> BenchmarkResult:
    """Measure the latency of ONNX graphs side by side in one process, after comparing their structure.

    Args:
        merged: ONNX folder or file of the merged model; of an exported pipeline of diffusers its folder, whose
            denoiser's step is measured.
        output: New folder for the report and every raw sample.
        base: That of the base; without it there is no verdict.
        unmerged: That of the unmerged model, the positive control.
        plugged: A folder with an `.onnx_adapter` file, or the file: the adapter is plugged in at run time.
        pytorch: (base, adapter), folders or Hub IDs: PEFT's unmerged model under PyTorch.
        beside: (name, folder) of other graphs of the same model.
        options: Batch and prompt sizes (None: as the graphs ask), margin (0.01 for 1 %), time in seconds, provider.
        force: Replace an existing output.
        progress: Receives stages and warnings.

    Returns:
        Medians in milliseconds, ratios with 90 % intervals, and the verdict: equivalent_by_structure where base and
        merged are one optimized graph, otherwise equivalent, slower or inconclusive.

    Raises:
        GateFailed: Merged is slower; report and samples are in `output.failed`.
        RuntimeUnavailable: The provider does not work here.
        InputError: The graphs cannot be compared.
    """
    from lora_export.workflows import latency
    from lora_export.workflows.pipelines import measuring

    how = options or BenchmarkOptions()
    if measuring.is_exported(Path(merged)):
        others = {"unmerged": unmerged, "plugged": plugged, "pytorch": pytorch, "beside": beside}
        measuring.refuse_arms([name for name, given in others.items() if given])
        base_folder, out = as_path(base), Path(output)
        return measuring.benchmark_pipelines(Path(merged), base_folder, out, how, progress, force=force)
    arms = latency.arms_of(
        Path(merged),
        as_path(base),
        as_path(unmerged),
        as_path(plugged),
        (resolve(pytorch[0]).folder, resolve(pytorch[1]).folder) if pytorch else None,
        [(name, Path(folder)) for name, folder in beside],
    )
    return latency.benchmark_folder(arms, Path(output), how, progress, force=force)


def package(
    run: Folder, target: str, output: Folder | File, options: PackageOptions | None = None, *,
    progress: Progress = SILENT,
) -> PackageResult:  # fmt: skip
    """Make a package for a runtime of a run that `merge_and_export` left.

    Args:
        run: Folder of the run; it passed its gates and was not changed since.
        target: genai, optimum, triton, transformers-js, hf or gguf.
        output: New folder, or file with `options.archive`.
        options: Name, variants, provider, licence, archive, signature.
        progress: Receives stages and warnings.

    Returns:
        File sizes in bytes, and each variant measured beside the run's own export.

    Raises:
        InputError: The run failed, was changed, or lacks what the runtime needs.
    """
    from lora_export.workflows.packaging import package as make

    return make(Path(run), target, Path(output), options or PackageOptions(), progress)
