"""The Python API: each function does what the command of its name does, with the same defaults.

Nothing is printed and no process is ended: a result comes back, or a `LoraExportError` is raised, which the command
line tells in words. Talk goes to `progress`. The file is long because every argument is documented here.
"""

from collections.abc import Sequence
from pathlib import Path

from lora_export.checkpoint.sources import Adapters, Model, choices_of, resolve, resolve_all
from lora_export.choices import Certify
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
    Verification,
    VerifyOptions,
)
from lora_export.progress import Silent

SILENT = Silent()


def merge_and_export(
    base: Model,
    adapters: Adapters,
    output: Model,
    options: StoryOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> Story:
    """Merge, export to ONNX, validate against the unmerged model, benchmark, and write a report.

    Args:
        base: Folder of the base model, or a hub id such as `owner/name@revision`.
        adapters: One adapter (folder or hub id), or a sequence of them, each alone or as (adapter, weight).
        output: New folder, all or nothing: `merged/`, `onnx/`, `report/`, `manifest.json`.
        options: What the options of `lora-export merge-and-export` say.
        progress: Told of stages, details, warnings and how far a stage is.

    Returns:
        The results of all stages.

    Raises:
        GateFailed: A gate did not pass; everything is in `output.failed`, and nothing in `output`.
        LoraExportError: Refused or failed before, with nothing written.
    """
    from lora_export import pipeline

    options = options or StoryOptions()
    return pipeline.merge_and_export(resolve(base), resolve_all(adapters), Path(output), options, progress)


def merge(
    base: Model,
    adapters: Adapters,
    output: Model,
    options: MergeOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> MergeResult:
    """Merge adapters into base weights: W' = round(f(W)), f in fp32 and rounded once, streamed in bounded memory.

    Args:
        base: Folder of safetensors, or a hub id; 4- and 8-bit weights are dequantized as training saw them.
        adapters: One adapter, or a sequence of them, each alone or as (adapter, weight).
        output: New folder, all or nothing, which transformers loads as it is, with a certificate.
        options: Which base, type, memory and combination; `max_memory` and `max_shard_size` in bytes.
        progress: Told of stages, warnings, and tensors done.

    Returns:
        Counts of tensors, the share of the change that survived rounding (1: all), peak memory in bytes, seconds.

    Raises:
        AdapterError: The adapter does not fit, or cannot be merged at all.
        CheckpointError: A file is damaged, unsafe or not understood.
        OutputError: The output exists, is held by another process, or does not fit on the disk.
    """
    from lora_export.merging import merge as merge_folder

    choices = choices_of(resolve_all(adapters))
    return merge_folder(resolve(base).folder, choices, Path(output), options or MergeOptions(), progress)


def validate(
    base: Model,
    adapters: Adapters,
    merged: Model,
    *,
    onnx: Sequence[Model] = (),
    base_onnx: Sequence[Model] = (),
    own_texts: Sequence[Model] = (),
    options: ValidationOptions | None = None,
    progress: Progress = SILENT,
) -> ValidationResult:
    """Compare a merged folder, and exports of it, with PEFT's unmerged forward in fp32, and each tensor in float64.

    Args:
        base: Folder or hub id that the adapter was trained on.
        adapters: What was merged, with the same weights.
        merged: The merged folder.
        onnx: Exports of it in different precisions.
        base_onnx: The base exported in the same ways and order; without them it is exported anew, and deleted.
        own_texts: A text file for each adapter, on which is measured what the merged model has left of it.
        options: Inputs, tolerance (in noise floors), and the merge's own, which decide which base is the truth.
        progress: Told of stages and warnings.

    Returns:
        Every check with its value, threshold and origin; `passed` says whether all held. Logits are differences of
        largest absolute value, KL is in nats, perplexities are per token.

    Raises:
        InputError: The folders do not belong together, or an input cannot be read.
    """
    from lora_export.workflows.validating import validate_folder

    return validate_folder(
        resolve(base),
        resolve_all(adapters),
        Path(merged),
        [Path(p) for p in onnx],
        [Path(p) for p in base_onnx],
        options or ValidationOptions(),
        progress,
        [Path(p) for p in own_texts],
    )


def export(
    model: Model,
    output: Model,
    *,
    adapters: Sequence[Model] = (),
    unmerged: bool = False,
    graph_from: Model | None = None,
    shared_as: str | None = None,
    options: ExportOptions | None = None,
    progress: Progress = SILENT,
) -> ExportResult:
    """Export a model folder to ONNX.

    Args:
        model: Folder or hub id.
        output: New folder, all or nothing.
        adapters: LoRAs that stay outside of the weights, as `.onnx_adapter` files.
        unmerged: The only one of `adapters` becomes operators of the graph instead.
        graph_from: An earlier export of the same base: its graph and options hold, and only weights are written.
        shared_as: With `graph_from`: write `NAME.onnx` and what differs from the base's weights into `output`.
        options: Precision, provider, engine, quantization.
        progress: Told of stages and details.

    Returns:
        Engine, precision, nodes, seconds, and file sizes in bytes.

    Raises:
        ExportError: No engine takes this architecture in this precision, or the graph did not check.
        InputError: Arguments do not go together.
    """
    from lora_export.workflows.exporting import check_export, export_model

    earlier = _path(graph_from)
    check_export(adapters, unmerged, earlier, shared_as)  # before a hub is asked
    return export_model(
        resolve(model),
        Path(output),
        [resolve(a) for a in adapters],
        options or ExportOptions(),
        progress,
        unmerged=unmerged,
        graph_from=earlier,
        shared_as=shared_as,
    )


def benchmark(
    merged: Model,
    output: Model,
    *,
    base: Model | None = None,
    unmerged: Model | None = None,
    plugged: Model | None = None,
    pytorch: tuple[Model, Model] | None = None,
    beside: Sequence[tuple[str, Model]] = (),
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
        plugged: A folder with an `.onnx_adapter` file, or the file: the adapter is plugged in as the graph runs.
        pytorch: (base, adapter), folders or hub ids: PEFT's unmerged model under PyTorch.
        beside: (name, folder) of other graphs of the same model.
        options: Batch and prompt sizes, margin (0.01 for 1 %), time in seconds, provider.
        force: Replace an output that exists.
        progress: Told of stages and warnings.

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
    run: Model, target: str, output: Model, options: PackageOptions | None = None, *, progress: Progress = SILENT
) -> PackageResult:
    """Make a package for a runtime of a run that `merge_and_export` left.

    Args:
        run: Folder of the run; it passed its gates and was not changed since.
        target: genai, optimum, triton, transformers-js or hf.
        output: New folder, or file with `options.archive`.
        options: Name, variants, provider, licence, archive, signature.
        progress: Told of stages and warnings.

    Returns:
        File sizes in bytes, and each variant measured beside the run's own export.

    Raises:
        InputError: The run failed, was changed, or lacks what the runtime needs.
    """
    from lora_export.workflows.packaging import package as make

    return make(Path(run), target, Path(output), options or PackageOptions(), progress)


def verify(
    path: Model,
    base: Model | None = None,
    adapters: Adapters = (),
    *,
    certify: Certify = "full",
    rows: int = 64,
    seed: int | None = None,
    graph: bool = True,
    key: Model | None = None,
    run: bool = False,
    runtime: Model | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Check again what an earlier merge, run or packaging left.

    Args:
        path: A merged folder, the folder of a whole run, or a package (folder or archive).
        base: The base that was merged into; without it (and for packages) only hashes can be checked.
        adapters: What was merged, with the same weights.
        certify: full: every byte is computed again; sampled: `rows` rows of each tensor, drawn at random.
        rows: How many rows, with sampled.
        seed: Of that draw; None: a new one, which the result names.
        graph: Of a run: build the graph of its ONNX export anew and compare it.
        key: Of a package: the public key of who signed it, in PEM.
        run: Of a package: have its runtime load it and answer the sample.
        runtime: With `run`: a Python interpreter, or a folder with node_modules, if it is not in this environment.
        progress: Told of stages.

    Returns:
        Every finding, and what could not be checked; `verified` says whether all held.

    Raises:
        InputError: The path is none of these, or an argument is for another of them.
    """
    from lora_export.workflows.verifying import verify as verify_path

    return verify_path(
        Path(path),
        resolve(base) if base else None,
        resolve_all(adapters),
        VerifyOptions(certify, rows, seed, graph),
        progress,
        key=_path(key),
        run=run,
        runtime=_path(runtime),
    )


def _path(model: Model | None) -> Path | None:
    return None if model is None else Path(model)
