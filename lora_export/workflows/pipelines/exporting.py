"""A pipeline of diffusers to ONNX: anew, or with the graphs of an earlier export."""

from pathlib import Path
from typing import Any

from lora_export.contracts import ExportOptions, ExportResult, Progress
from lora_export.errors import InputError


def export_pipeline_folder(
    folder: Path, output: Path, adapters: int, options: ExportOptions, progress: Progress
) -> ExportResult:
    """Write the pipeline in `folder` as ONNX into the new folder `output`. adapters: how many stay outside of it.

    With `options.graph_from`, an earlier export of the same base gives the graphs.
    """
    from lora_export.checkpoint.pipeline import open_pipeline
    from lora_export.onnx_export.diffusion.pipeline_export import export_pipeline, reweight_pipeline
    from lora_export.workflows.proving import prover

    _refuse_outside(folder, adapters, options)
    pipeline = open_pipeline(folder)
    if options.graph_from is not None:
        return reweight_pipeline(options.graph_from, pipeline, output, force=options.force, progress=progress)
    return export_pipeline(pipeline, output, options, prove=prover(options.proof), progress=progress)


def planned_pipeline_export(folder: Path, options: ExportOptions) -> dict[str, Any]:
    """The engine, the precision and the graphs that an export will have; refuses what headers can tell."""
    from lora_export.checkpoint.pipeline import open_pipeline
    from lora_export.onnx_export import load_export
    from lora_export.onnx_export.diffusion.pipeline_export import check_pipeline

    _refuse_outside(folder, 0, options)
    if options.graph_from is not None:
        like = load_export(options.graph_from)
        return {"engine": like.engine, "precision": like.precision, "graph_from": str(options.graph_from)}
    parts = check_pipeline(open_pipeline(folder), options)
    return {"engine": "diffusion", "precision": options.precision, "graphs": [part.folder for part in parts]}


def _refuse_outside(folder: Path, adapters: int, options: ExportOptions) -> None:
    """InputError for adapters that would stay outside of a pipeline's graphs."""
    if adapters or options.unmerged:
        raise InputError(
            "--adapter with a pipeline: its graphs have no slots for adapters",
            where=folder,
            expected="a merged pipeline",
            next_step="lora-export merge -b PIPELINE -a ADAPTER -o MERGED, then export -m MERGED",
        )
    if options.shared_as is not None:
        raise InputError(
            "--shared-as with a pipeline: its exports do not share weights",
            where=folder,
            expected="--graph-from alone, which writes the changed weights anew",
        )
