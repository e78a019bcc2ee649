"""A pipeline of diffusers as a folder of exports, which Optimum's pipelines load: one model after another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

from lora_export import onnx_export
from lora_export.checkpoint.companions import SKIPPED_SUFFIXES
from lora_export.choices import Precision
from lora_export.contracts import (
    ExportOptions,
    ExportResult,
    Pipeline,
    Progress,
    Proof,
    QuantizationOptions,
    TensorSource,
)
from lora_export.errors import ExportError, RuntimeUnavailable
from lora_export.onnx_export import records
from lora_export.onnx_export.diffusion.components import DECODER, ENCODER, LEFT_OUT, TEXT, Part, parts_of
from lora_export.onnx_export.engines import engine_named
from lora_export.onnx_export.engines.attempts import Prove
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.onnx_export.quantize.settings import AUTO, TOUCHED, blockwise
from lora_export.onnx_export.records import ComponentRecord, ExportRecord, load_export
from lora_export.runtime import resolve_provider
from lora_export.storage import files, sealed

ENGINE, TASK, GRAPH, INDEX = "diffusion", "text-to-image", "model.onnx", "model_index.json"
_QUANTIZED: tuple[Precision, ...] = ("int8", "int4", "nf4")
Sources = Mapping[str, TensorSource]  # component → its numbers


def export_pipeline(
    pipeline: Pipeline,
    output: Path,
    options: ExportOptions,
    *,
    sources: Sources | None = None,
    prove: Prove | None = None,
    inputs: Sequence[Path] = (),
    progress: Progress,
) -> ExportResult:
    """Write the models of `pipeline` as ONNX into the new folder `output`, all or nothing.

    One graph a folder, by Optimum's names (`unet/model.onnx`), an autoencoder's two in two; beside them what the
    models need besides: the scheduler, tokenizers, model_index.json. A denoiser alone is `output/model.onnx`.
    sources: the numbers of components, where these are not those of their files; prove, inputs: as in
    `onnx_export.export`. ExportError before any work for a pipeline that has no such graphs.
    """
    sources = sources or {}
    parts = check_pipeline(pipeline, options)
    with Worker() as worker:

        def export(part: Part, folder: Path, told: Progress) -> str:
            own, note = _own_options(part, options)
            own = replace(own, force=options.force and folder == output)
            if note:
                told.detail(f"{part.folder}: {own.precision}, because {note}")
            source = sources.get(part.component.name)
            onnx_export.export(
                part.component.folder, folder, own, source=source, prove=prove, part=part.folder, inputs=inputs,
                worker=worker, progress=told,
            )  # fmt: skip
            return note

        if _alone(pipeline, parts):
            export(parts[0], output, progress)
            return load_export(output)
        return _written(pipeline, parts, output, options, export, inputs, progress)


def reweight_pipeline(
    earlier: Path,
    pipeline: Pipeline,
    output: Path,
    *,
    sources: Sources | None = None,
    force: bool = False,
    progress: Progress,
) -> ExportResult:
    """Export `pipeline` with the graphs of `earlier`, an export of the same base: only data files are written anew.

    The result is, byte for byte, what a fresh export with the options of `earlier` gives.
    """
    sources = sources or {}
    record, parts = check_earlier(earlier, pipeline)
    if record.kind == "component":
        folder, source = parts[0].component.folder, sources.get(parts[0].component.name)
        return onnx_export.reweight(earlier, folder, output, source=source, force=force, progress=progress)
    before = record.components or {}

    def export(part: Part, folder: Path, told: Progress) -> str:
        source = sources.get(part.component.name)
        model = part.component.folder
        onnx_export.reweight(earlier / part.folder, model, folder, source=source, progress=told)
        return before[part.folder].note

    itself = output.exists() and output.samefile(earlier)
    options = ExportOptions(
        precision=record.precision, provider=record.provider, optimize=record.optimize, force=force
    )
    return _written(pipeline, parts, output, options, export, () if itself else (earlier,), progress)


def check_earlier(earlier: Path, pipeline: Pipeline) -> tuple[ExportRecord, tuple[Part, ...]]:
    """The record of an earlier export, and the graphs of a pipeline that is to take them. ExportError where it has
    others."""
    record, parts = records.read_record(earlier), parts_of(pipeline)
    if _alone(pipeline, parts) and record.kind == "component":
        return record, parts
    before = record.components or {}
    if record.kind != "pipeline" or before.keys() != {p.folder for p in parts}:
        raise ExportError(
            f"the earlier export has {', '.join(before) or 'one graph'}, and this pipeline "
            f"{', '.join(p.folder for p in parts)}",
            where=earlier,
            expected="an export of the same base, before or after another adapter was merged",
            next_step="export the pipeline without --graph-from",
        )
    return record, parts


def check_pipeline(pipeline: Pipeline, options: ExportOptions) -> tuple[Part, ...]:
    """The graphs that an export will have. ExportError for what cannot be exported so, before any work."""
    parts = parts_of(pipeline)
    _refuse_without_diffusers()
    how, engine = options.quantization, engine_named(ENGINE)
    if options.engine not in (None, ENGINE):
        raise ExportError(
            f"the engine {options.engine} does not export pipelines",
            expected=f"--engine {ENGINE}, or no --engine",
        )
    if {AUTO, TOUCHED} & {*how.keep}:
        word = AUTO if AUTO in how.keep else TOUCHED
        raise ExportError(
            f"--keep {word} is not possible for pipelines",
            expected="names or patterns of the denoiser's nodes or tensors",
            next_step="name them with --keep",
        )
    if how.activations != "float" or how.calibration is not None:
        raise ExportError(
            "8-bit activations and calibration need texts that a model reads, and a denoiser reads none",
            expected="weights in int8, int4 or nf4 alone",
            next_step="the same command without --activations and --calibration",
        )
    engine.check_precision(options.precision, options.provider)
    blockwise(options.precision, options.provider, how, generates=False)
    return parts


def _refuse_without_diffusers() -> None:
    if find_spec("diffusers") is None:
        raise RuntimeUnavailable(
            "diffusers is not installed, and it has the classes of a pipeline's models",
            expected="the package diffusers",
            next_step="pip install 'lora-export[diffusion]'",
        )


def _alone(pipeline: Pipeline, parts: Sequence[Part]) -> bool:
    """Whether a model stands alone, and has one graph."""
    return pipeline.class_name is None and len(parts) == 1


def _own_options(part: Part, options: ExportOptions) -> tuple[ExportOptions, str]:
    """The options of one graph, and why they are others than were asked for."""
    own, note = replace(options, engine=ENGINE), ""
    vae = part.folder in (ENCODER, DECODER)
    if vae and options.precision in _QUANTIZED:
        note = "an autoencoder's weights are convolutions, which are not quantized"
    elif vae and options.precision != "fp32" and part.component.config.get("force_upcast"):
        note = "config.json has force_upcast: its numbers go beyond what fp16 holds"
    if note:
        own = replace(own, precision="fp32", quantization=QuantizationOptions())
    elif part.folder.startswith(TEXT) or vae:  # patterns are of the denoiser's names
        own = replace(own, quantization=replace(own.quantization, keep=(), eight_bits=()))
    return own, note


def _written(
    pipeline: Pipeline,
    parts: Sequence[Part],
    output: Path,
    options: ExportOptions,
    export: Callable[[Part, Path, Progress], str],
    inputs: Sequence[Path],
    progress: Progress,
) -> ExportResult:
    """A folder of exports with its record, all or nothing. export: makes one of them, and says what to note."""
    started = monotonic()
    with files.output_folder(output, options.force, inputs=[pipeline.folder, *inputs]) as stage:
        made: dict[str, ComponentRecord] = {}
        own: dict[str, ExportRecord] = {}
        for part in parts:
            progress.detail(f"{part.folder}: {part.component.class_name}")
            folder = stage / part.folder
            note = export(part, folder, progress)
            own[part.folder] = one = records.read_record(folder)
            made[part.folder] = ComponentRecord(
                part.component.class_name, part.component.name, one.precision, one.nodes, note,
                sealed.sha256(folder / records.NAME),
            )  # fmt: skip
        _copy_others(pipeline, stage, progress)
        provider = resolve_provider("auto") if options.provider == "auto" else options.provider
        record = ExportRecord(
            engine=ENGINE,
            precision=options.precision,
            provider=provider,
            optimize=options.optimize,
            kind="pipeline",
            task=TASK,
            graphs=tuple(f"{part.folder}/{GRAPH}" for part in parts),
            nodes=sum(one.nodes for one in made.values()),
            architecture=pipeline.class_name or parts[0].component.class_name,
            proof=_joined({name: one.proof for name, one in own.items()}),
            quantization=next((one.quantization for one in own.values() if one.quantization), None),
            components=made,
            seconds=round(monotonic() - started, 3),
            graph_versions=records.versions(),
        )
        records.write_record(stage, record)
    return load_export(output)


def other_files(pipeline: Pipeline) -> list[Path]:
    """What an export has besides models: the index, and all of the scheduler, tokenizers and their like but code
    and weights. What has weights of its own and no graph is left out."""
    if pipeline.class_name is None:
        return []
    parts = [pipeline.folder / name for name in pipeline.others if name not in LEFT_OUT]
    inside = [p for part in parts for p in sorted(part.iterdir())]
    kept = (p for p in inside if p.suffix not in SKIPPED_SUFFIXES and not p.name.startswith("."))
    return [pipeline.folder / INDEX, *(p for p in kept if p.is_file())]


def _copy_others(pipeline: Pipeline, stage: Path, progress: Progress) -> None:
    """Byte for byte."""
    for name in sorted(LEFT_OUT & {*pipeline.others, *pipeline.components}):
        progress.warn(f"{name} is not exported: Optimum's pipelines take it from PyTorch, or do without")
    for path in other_files(pipeline):
        target = stage / path.relative_to(pipeline.folder)
        target.parent.mkdir(exist_ok=True)
        sealed.copy(path, target, pipeline.folder)


def _joined(proofs: Mapping[str, Proof | None]) -> Proof | None:
    """The proof with the largest share of what is allowed, for the cases of all; None where one is missing."""
    found = {name: proof for name, proof in proofs.items() if proof is not None}
    if len(found) != len(proofs) or not found:
        return None
    name, worst = max(found.items(), key=lambda item: float(item[1].difference) / float(item[1].allowed))
    return replace(
        worst,
        cases=sum(p.cases for p in found.values()),
        case=f"{name}: {worst.case}",
        limits=tuple(f"{n}: {limit}" for n, p in found.items() for limit in p.limits),
        not_reached=tuple(f"{n}: {what}" for n, p in found.items() for what in p.not_reached),
        seconds=round(sum(float(p.seconds) for p in found.values()), 3),
    )
