"""The Python API: each function does what the command of its name does, with the same defaults.

Nothing is printed and no process is ended: a result comes back, or a `LoraExportError` is raised, which the command
line reports. Progress goes to `progress`. The file is long because every argument is documented here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    RankOptions,
    ReportPages,
    Story,
    StoryOptions,
    Understanding,
    ValidationOptions,
    ValidationResult,
    Verification,
    VerifyOptions,
)
from lora_export.errors import InputError
from lora_export.progress import Silent

if TYPE_CHECKING:
    from lora_export.adapter_tools import Derived
    from lora_export.merging import MergePlan
    from lora_export.workflows.switching import Switched

SILENT = Silent()
Folder = str | Path  # of this machine, never a Hub ID; an output is created
File = str | Path


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
    """Merge adapters into base weights: W' = round(f(W)), f in fp32 and rounded once, streamed in bounded memory.

    Args:
        base: Folder of safetensors, or a Hub ID; 4- and 8-bit weights are dequantized as training saw them.
        adapters: One adapter or several, as for `merge_and_export`; none: a quantized base is only dequantized.
        output: New folder, all or nothing, which transformers loads as it is, with a certificate.
        options: Which base, type, memory and combination; `max_memory` and `max_shard_size` in bytes.
        progress: Receives stages, warnings, and tensors done.

    Returns:
        Counts of tensors, the share of the change that survived rounding (1: all), peak memory in bytes, seconds.

    Raises:
        AdapterError: The adapter does not fit, or cannot be merged at all.
        CheckpointError: A file is damaged, unsafe or not understood.
        OutputError: The output exists, is held by another process, or does not fit on the disk.
    """
    from lora_export.merging import merge as merge_folder

    choices = adapter_choices(adapters)
    return merge_folder(resolve(base).folder, choices, Path(output), options or MergeOptions(), progress)


def plan(base: Model, adapters: Adapters, options: MergeOptions | None = None) -> "MergePlan":
    """What `merge` would do, from headers alone: the plan that `--dry-run` prints.

    Args:
        base: Folder of safetensors, or a Hub ID.
        adapters: One adapter or several, as for `merge_and_export`.
        options: Those of the merge.

    Returns:
        Each tensor of the output with what happens to it, shards, and changes of config.json.

    Raises:
        LoraExportError: What `merge` would refuse before it computes.
    """
    from lora_export.merging import plan as plan_merge

    return plan_merge(resolve(base).folder, adapter_choices(adapters), options or MergeOptions())


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
    from lora_export.workflows.validating import validate_folder

    return validate_folder(
        resolve(base),
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
        merged: ONNX folder or file of the merged model.
        output: New folder for the report and every raw sample.
        base: That of the base; without it there is no verdict.
        unmerged: That of the unmerged model, the positive control.
        plugged: A folder with an `.onnx_adapter` file, or the file: the adapter is plugged in at run time.
        pytorch: (base, adapter), folders or Hub IDs: PEFT's unmerged model under PyTorch.
        beside: (name, folder) of other graphs of the same model.
        options: Batch and prompt sizes, margin (0.01 for 1 %), time in seconds, provider.
        force: Replace an existing output.
        progress: Receives stages and warnings.

    Returns:
        Medians in milliseconds, ratios with 90 % intervals, and the verdict: equivalent, slower or inconclusive.

    Raises:
        GateFailed: Merged is slower; report and samples are in `output.failed`.
        RuntimeUnavailable: The provider does not work here.
        InputError: The graphs cannot be compared.
    """
    from lora_export.workflows import latency

    arms = latency.arms_of(
        Path(merged),
        _path(base),
        _path(unmerged),
        _path(plugged),
        (resolve(pytorch[0]).folder, resolve(pytorch[1]).folder) if pytorch else None,
        [(name, Path(folder)) for name, folder in beside],
    )
    return latency.benchmark_folder(arms, Path(output), options or BenchmarkOptions(), progress, force=force)


def package(
    run: Folder, target: str, output: Folder | File, options: PackageOptions | None = None, *,
    progress: Progress = SILENT,
) -> PackageResult:  # fmt: skip
    """Make a package for a runtime of a run that `merge_and_export` left.

    Args:
        run: Folder of the run; it passed its gates and was not changed since.
        target: genai, optimum, triton, transformers-js or hf.
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


def switch(
    model: Folder,
    before: Adapters,
    after: Adapters,
    base: Model | None = None,
    options: MergeOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> "Switched":
    """Put other adapters in the place of those in a merged folder or its ONNX export, bit for bit as a fresh merge.

    Args:
        model: A merged folder, or an ONNX export of one, which is changed.
        before: The adapters that are in it, with their weights.
        after: The adapters that replace them.
        base: The base of both; None: the one that the first adapter of `after` names.
        options: Of the merge that an export was made of; a merged folder has its own in its certificate.
        progress: Receives stages and warnings.

    Returns:
        How many tensors differ, bytes written, and seconds.

    Raises:
        InputError: The folder does not hold `before`, or the two need folders of different layout.
        CheckpointError: The base is not the one that the folder was made of.
    """
    from lora_export.workflows import switching

    old, new = adapter_choices(before), adapter_choices(after)
    of_both = resolve(base or switching.base_of(new[0].folder)).folder
    return switching.switch(Path(model), of_both, old, new, progress, options or MergeOptions())


def combine(
    adapters: Adapters,
    output: Folder,
    options: MergeOptions | None = None,
    rank: RankOptions | None = None,
) -> "Derived":
    """Make one adapter of several, without a base.

    Args:
        adapters: The adapters, with their weights.
        output: New folder of a LoRA that PEFT loads.
        options: How they are combined; None: their weighted sum (linear).
        rank: Rank and type of the new adapter; without one a sum of LoRAs is exact.

    Returns:
        Ranks, size, and the error that the rank costs, relative to ‖ΔW‖.

    Raises:
        AdapterError: An adapter needs the weights of the base (DoRA, OFT, IA3).
        InputError: The options do not go together.
    """
    from lora_export.adapter_tools import combine as combine_adapters
    from lora_export.adapter_tools.saving import Rank

    options, rank = options or MergeOptions(combine="linear"), rank or RankOptions()
    cut = Rank(rank.rank, rank.energy)
    return combine_adapters(adapter_choices(adapters), Path(output), options, cut, rank.dtype, rank.force)


def extract(
    base: Model,
    tuned: Model,
    output: Folder,
    rank: RankOptions | None = None,
    *,
    rest: Literal["save", "drop", "refuse"] = "save",
    progress: Progress = SILENT,
) -> "Derived":
    """Take a LoRA out of a fully tuned model: B·A of the largest singular values of each layer's difference.

    Args:
        base: Folder or Hub ID of the base.
        tuned: Folder or Hub ID of the tuned model.
        output: New folder of a LoRA that PEFT loads.
        rank: A rank, or a share of ‖ΔW‖² to keep; one of them is needed.
        rest: Changed weights that are not matrices of a layer: saved whole, left out, or refused.
        progress: Receives how far it is.

    Returns:
        Ranks, size, and the error that the rank costs, relative to ‖ΔW‖.

    Raises:
        CheckpointError: The two models have different architectures.
        InputError: No rank is given.
    """
    from lora_export.adapter_tools import extract as extract_adapter
    from lora_export.adapter_tools.saving import Rank

    rank, folders = rank or RankOptions(), (resolve(base).folder, resolve(tuned).folder)
    cut = Rank(rank.rank, rank.energy)
    return extract_adapter(*folders, Path(output), cut, rest, rank.dtype, rank.force, progress)


def truncate(adapter: Model, output: Folder, rank: RankOptions | None = None) -> "Derived":
    """Write an adapter in a lower rank, each module with the largest singular values of its own B·A.

    Args:
        adapter: Folder or Hub ID.
        output: New folder.
        rank: A rank, or a share of ‖ΔW‖² to keep; one of them is needed.

    Returns:
        Ranks, size, and the error that the rank costs, relative to ‖ΔW‖.

    Raises:
        AdapterError: A kind that has no rank.
        InputError: No rank is given.
    """
    from lora_export.adapter_tools import truncate as truncate_adapter
    from lora_export.adapter_tools.saving import Rank

    rank = rank or RankOptions()
    cut = Rank(rank.rank, rank.energy)
    return truncate_adapter(resolve(adapter).folder, Path(output), cut, rank.dtype, rank.force)


def inspect(path: Model, base: Model | None = None) -> dict[str, Any]:
    """Say what a folder is and what a person would ask about it, from headers alone.

    Args:
        path: A base, an adapter, an ONNX export, a run or a package.
        base: For an adapter: the base to match it with, tensor by tensor.

    Returns:
        `kind`, and facts about that kind by their names in JSON.

    Raises:
        LoraExportError: The folder is none of these, or is damaged.
    """
    from lora_export.workflows.inspection import inspect_folder

    return inspect_folder(resolve(path).folder, resolve(base).folder if base else None)


def understand(
    adapter: Model,
    base: Model | None = None,
    picture: File | None = None,
    force: bool = False,
    *,
    progress: Progress = SILENT,
) -> Understanding:
    """Read the numbers of an adapter and say what it has learnt (`lora-export inspect -a`).

    Args:
        adapter: Folder or Hub ID.
        base: Its base, to compare the size of its change with.
        picture: A heat map by layer and module to write: FILE.svg, or FILE.html with everything.
        force: Replace an existing picture.
        progress: Receives how far it is.

    Returns:
        Norms, singular values and ranks of each weight, sentences about them, and warnings.

    Raises:
        AdapterError: The adapter does not fit the base.
        OutputError: The picture exists.
    """
    from lora_export.workflows.understanding import understand_adapter

    folders = resolve(adapter).folder, resolve(base).folder if base else None
    return understand_adapter(*folders, _path(picture), force, progress)


def report(
    run: Folder, compare: Folder | None = None, output: Folder | None = None, *, force: bool = False
) -> ReportPages:
    """Write report.html and report.md of a run again from its report.json, or a comparison of two runs.

    Args:
        run: Folder of a run, or a folder with a report.json.
        compare: Another run. Then `run` stays as it is, and the pages go into `output`.
        output: New folder for a comparison. None: RUN-vs-OTHER, next to the run.
        force: Replace an existing output.

    Returns:
        The files written: `html` and `markdown`.

    Raises:
        InputError: There is no report, or it is damaged; or an output without a run to compare with.
    """
    from lora_export.workflows import run_report

    if compare is not None:
        return run_report.compare(Path(run), Path(compare), Path(output) if output else None, force=force)
    if output is not None:
        raise InputError(f"an output, {output}, without a run to compare with", next_step="--compare OTHER")
    return run_report.render(Path(run))


def verify(
    path: Folder | File,
    base: Model | None = None,
    adapters: Adapters = (),
    options: VerifyOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> Verification:
    """Check again what an earlier merge, run or packaging left.

    Args:
        path: A merged folder, the folder of a whole run, or a package (folder or archive).
        base: The base that was merged into; without it (and for packages) only hashes can be checked.
        adapters: What was merged, with the same weights.
        options: How much of a merge is recomputed; the key, and the runtime, of a package.
        progress: Receives stages.

    Returns:
        Every finding, and what could not be checked; `verified` says whether all held.

    Raises:
        InputError: The path is none of these, or an argument is for another of them.
    """
    from lora_export.workflows.verifying import verify as verify_path

    folder = resolve(base).folder if base else None
    return verify_path(Path(path), folder, adapter_choices(adapters), options or VerifyOptions(), progress)


def env() -> dict[str, Any]:
    """Versions, hardware, and which execution providers really run a model here.

    Returns:
        What `lora-export env --json` prints, but for the configuration of commands.

    Raises:
        RuntimeUnavailable: ONNX Runtime is not installed.
    """
    import platform

    import psutil

    from lora_export.manifest import versions
    from lora_export.runtime import providers_report
    from lora_export.version import __version__

    return {
        "lora_export": __version__,
        "platform": platform.platform(),
        "cpu_count": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": versions(),
        "providers": providers_report(),
    }


def _path(path: Folder | File | None) -> Path | None:
    return None if path is None else Path(path)
