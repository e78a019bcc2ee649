"""A run of a pipeline, checked again: its merged models, and the graphs that were exported of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.checkpoint import TensorFiles
from lora_export.checkpoint.hashing import hash_all
from lora_export.checkpoint.pipeline import open_component, open_pipeline
from lora_export.contracts import AdapterChoice, Component, Finding, Pipeline, Progress, Verification, VerifyOptions
from lora_export.contracts.option import kept
from lora_export.errors import LoraExportError
from lora_export.manifest import RecordedOptions
from lora_export.merging.certificate.document import NAME, read_certificate
from lora_export.merging.pipelines.document import read_pipeline_certificate
from lora_export.merging.pipelines.planning import plan_pipeline
from lora_export.merging.pipelines.verifying import verify_pipeline
from lora_export.onnx_export import records
from lora_export.onnx_export.weights.recheck import Model, check_graphs, recheck


def verify_models(
    run: Path,
    base: Path | None,
    adapters: Sequence[AdapterChoice],
    options: RecordedOptions,
    how: VerifyOptions,
    progress: Progress,
    why_not: str | None,
) -> list[Verification]:
    """The merged pipeline of a run, and its graphs: built anew, unless `why_not` says why they cannot be."""
    merged = verify_pipeline(run / "merged", base, adapters, how, progress)
    if not (run / "onnx").is_dir():
        return [merged]
    if not merged.verified:
        why_not = "the ONNX graphs and their weights: the merged pipeline failed its checks"
    if why_not is not None:
        return [merged, Verification((check_graphs(run / "onnx", "onnx_graphs"),), (why_not,))]
    try:
        return [merged, _graphs(run / "onnx", open_pipeline(run / "merged"), options, how, progress)]
    except LoraExportError as error:
        return [merged, Verification((Finding("onnx", False, error.found),))]


def _graphs(
    export: Path, pipeline: Pipeline, options: RecordedOptions, how: VerifyOptions, progress: Progress
) -> Verification:
    from lora_export.onnx_export.diffusion.rechecking import recheck_pipeline

    models = {name: _model(component, options) for name, component in pipeline.components.items()}
    if records.read_record(export).kind == "pipeline":
        return recheck_pipeline(export, pipeline, models, how.graph, progress).result()
    (model,) = models.values()  # of diffusers, alone
    return recheck(export, model, how.graph, progress).result()


def _model(component: Component, options: RecordedOptions) -> Model:
    """A merged model with the hashes of its certificate; one that was copied with those of its bytes, which the
    certificate of the pipeline names."""
    source = TensorFiles(open_component(component).tensors)
    quantization = options.quantization
    if not (component.folder / NAME).is_file():
        return Model(component.folder, source, hash_all(source), quantization)
    recorded = read_certificate(component.folder)
    hashes = {n: h for n, h in sorted(recorded.hashes.items()) if h is not None}
    return Model(component.folder, source, hashes, replace(quantization, touched=recorded.touched))


def odd_options(merged: Path, base: Path, adapters: Sequence[AdapterChoice], options: RecordedOptions) -> list[str]:
    """The options of a run's manifest that do not lead to the certificate of its merged pipeline.

    LoraExportError for options with which nothing can be merged.
    """
    planned = plan_pipeline(base, adapters, options.merge)
    if planned.pipeline.class_name is None:
        recorded = read_certificate(merged).options
    else:
        recorded = read_pipeline_certificate(merged).options
    given, certified = kept(planned.options), kept(recorded)
    return sorted(name for name in certified if given.get(name) != certified[name])
