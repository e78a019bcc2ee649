"""The export of a pipeline checked again: each model's by its own recheck, and what lies beside them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lora_export.contracts import Findings, Pipeline, Progress
from lora_export.errors import LoraExportError
from lora_export.onnx_export import records
from lora_export.onnx_export.diffusion.components import Part, parts_of
from lora_export.onnx_export.diffusion.pipeline_export import ENGINE, GRAPH, TASK, other_files
from lora_export.onnx_export.weights.recheck import Model, recheck
from lora_export.storage import sealed


def recheck_pipeline(
    folder: Path, pipeline: Pipeline, models: Mapping[str, Model], rebuild: bool, progress: Progress
) -> Findings:
    """Compare the export in `folder` with one of `pipeline`. models: by component, what is proved of each.

    What cannot be read or does not fit is a check that failed. rebuild: as in `recheck`.
    """
    findings = Findings()
    try:
        parts = parts_of(pipeline)
        findings.judge("onnx_record", "export.json is that of these models", _records(folder, pipeline, parts))
    except LoraExportError as error:
        findings.fail("onnx_record", f"{error.found} ({error.where})" if error.where else error.found)
        return findings
    known = {p.relative_to(pipeline.folder).as_posix() for p in other_files(pipeline)}
    passed = f"{len(known)} files beside the models are the pipeline's"
    findings.judge("onnx_files", passed, _others(folder, pipeline.folder, parts, known))
    for part in parts:
        progress.stage(f"verify: {part.folder}")
        own = recheck(folder / part.folder, models[part.component.name], rebuild, progress)
        findings.done += [replace(f, name=f"{part.folder}: {f.name}") for f in own.done]
        findings.not_checked += [text for text in own.not_checked if text not in findings.not_checked]
    return findings


def _records(folder: Path, pipeline: Pipeline, parts: tuple[Part, ...]) -> Iterator[str]:
    """How the record of the pipeline differs from what the records of its models say."""
    record = records.read_record(folder)
    told = record.components or {}
    graphs = tuple(f"{part.folder}/{GRAPH}" for part in parts)
    architecture = pipeline.class_name or parts[0].component.class_name
    if (record.kind, record.graphs, record.architecture) != ("pipeline", graphs, architecture):
        yield f"it is of {record.architecture} with {', '.join(record.graphs)}, and not of {', '.join(graphs)}"
    if (record.engine, record.task) != (ENGINE, TASK):
        yield f"it names the engine {record.engine} and the task {record.task}"
    for part in parts:
        own, path = told.get(part.folder), folder / part.folder / records.NAME
        if own is None:
            yield f"{part.folder} is not in it"
            continue
        one = records.read_record(folder / part.folder)
        if own.record_sha256 != sealed.sha256(path):
            yield f"{part.folder}/{records.NAME} is not the one that it was written with"
        wanted = part.component.class_name, part.component.name, one.precision, one.nodes, part.folder
        if (own.class_name, own.source, own.precision, own.nodes, one.part) != wanted:
            yield f"what it says of {part.folder} is not what {part.folder}/{records.NAME} says"
        if own.precision != record.precision and not own.note:
            yield f"{part.folder} is {own.precision}, and the export {record.precision}"
        if (one.provider, one.optimize) != (record.provider, record.optimize):
            yield f"{part.folder} is for {one.provider}, {one.optimize}, and the export for {record.provider}"
    quantized = (records.read_record(folder / part.folder).quantization for part in parts)
    if record.quantization != next((how for how in quantized if how), None):
        yield "its quantization is not that of its models"
    if told.keys() - {part.folder for part in parts}:
        yield f"the pipeline has no {', '.join(sorted(told.keys() - {part.folder for part in parts}))}"
    if record.nodes != sum(one.nodes for one in told.values()):
        yield f"it has {record.nodes} nodes, its models {sum(one.nodes for one in told.values())}"


def _others(folder: Path, pipeline: Path, parts: tuple[Part, ...], known: Collection[str]) -> Iterator[str]:
    """How the files beside the models differ from those that are copied from the pipeline."""
    models = {part.folder for part in parts}
    there = {
        name for name in sealed.hash_folder(folder) if name.partition("/")[0] not in models and name != records.NAME
    }
    yield from (f"{name} is missing" for name in sorted({*known} - there))
    yield from (f"{name} is not a file of an export" for name in sorted(there - {*known}))
    for name in sorted(there & {*known}):
        if sealed.sha256(folder / name, folder) != sealed.sha256(pipeline / name, pipeline):
            yield f"{name} is not the pipeline's"
