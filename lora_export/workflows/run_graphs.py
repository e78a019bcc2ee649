"""The graphs of a run: merged, base and unmerged, of which the later ones take the first one's graph."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import (
    AdapterChoice,
    ExportOptions,
    ExportResult,
    MergeResult,
    Progress,
    StoryOptions,
)
from lora_export.errors import ExportError

if TYPE_CHECKING:
    from lora_export.contracts import TensorSource
    from lora_export.onnx_export.engines.isolated import Worker


def like_earlier(options: ExportOptions) -> ExportOptions:
    """With the precision and the engine of the export whose graph is to be taken, if there is one."""
    if options.graph_from is None:
        return options
    from lora_export.onnx_export import load_export

    like = load_export(options.graph_from)
    return replace(options, precision=like.precision, engine=like.engine)


def merge_into(
    base_onnx: ExportResult,
    base: Path,
    adapters: Sequence[AdapterChoice],
    outline: Path,
    stage: Path,
    options: StoryOptions,
    progress: Progress,
    worker: "Worker | None" = None,
) -> tuple[MergeResult, ExportResult]:
    """Merge and export in one pass; the certificate lies in `stage`, the rest of a merged folder in `outline`."""
    from lora_export.merging import CERTIFICATE, begin_stream, end_stream, plan

    started = time.monotonic()
    source = begin_stream(plan(base, adapters, options.merge), outline, progress)
    exported = export_merged(base_onnx, outline, stage / "onnx", options.export, progress, source, worker)
    seconds = time.monotonic() - started
    return end_stream(source, stage / CERTIFICATE, seconds, progress), exported


def export_merged(
    base_onnx: ExportResult,
    merged: Path,
    output: Path,
    options: ExportOptions,
    progress: Progress,
    source: "TensorSource | None" = None,
    worker: "Worker | None" = None,
) -> ExportResult:
    """The merged model with the base's graph; with one of its own where the merge changed more than weights.

    source: where the numbers come from, if `merged` is an outline without them; or its files with known hashes.
    """
    progress.stage("export: the merged model, with the graph of the base")
    return with_graph_of(base_onnx, merged, output, options, progress, "the merged model", source, worker=worker)


def with_graph_of(
    earlier: ExportResult,
    model: Path,
    output: Path,
    options: ExportOptions,
    progress: Progress,
    what: str,
    source: "TensorSource | None" = None,
    ready: tuple[Path, ...] = (),
    worker: "Worker | None" = None,
) -> ExportResult:
    """`model` with the graph of `earlier`; with one of its own where that does not take its weights. ready, worker:
    as in `export_as`."""
    from lora_export.onnx_export import reweight

    try:
        return reweight(earlier.output, model, output, source=source, ready=ready, progress=progress)
    except ExportError as error:
        if options.graph_from is not None:
            raise
        progress.detail(f"a graph of its own: {error.found}")
    return export_as(model, output, options, progress, what, source=source, ready=ready, worker=worker)


def export_as(
    model: Path,
    output: Path,
    options: ExportOptions,
    progress: Progress,
    what: str,
    adapter: Path | None = None,
    source: "TensorSource | None" = None,
    calibrated_on: "TensorSource | None" = None,
    ready: tuple[Path, ...] = (),
    proven: bool = True,
    worker: "Worker | None" = None,
) -> ExportResult:
    """calibrated_on: the numbers of the model that reads calibration texts, if not these; ready: other exports of
    the same numbers, to copy from; proven: whether the graph is compared with PyTorch; worker: the process to make
    it in, a new one if None."""
    from lora_export.onnx_export import export, reweight
    from lora_export.workflows.proving import prover

    progress.stage(f"export: {what}")
    if options.graph_from is not None and adapter is None:
        return reweight(options.graph_from, model, output, progress=progress)
    return export(
        model,
        output,
        replace(options, force=False),
        adapter=adapter,
        source=source,
        prove=prover(options.proof) if proven else None,
        calibrated_on=calibrated_on,
        ready=ready,
        worker=worker,
        progress=progress,
    )


@dataclass(frozen=True)
class Control:
    """The unmerged graph, which the benchmark must find slower, or why there is none.

    trained_on, adapters: what it was made of.
    """

    export: ExportResult | None
    why_not: tuple[str, ...]
    trained_on: Path
    adapters: Sequence[AdapterChoice]


def control_of(
    trained_on: Path,
    base: Path,
    adapters: Sequence[AdapterChoice],
    work: Path,
    options: StoryOptions,
    merged: ExportResult,
    progress: Progress,
    worker: "Worker | None" = None,
) -> Control:
    """trained_on: the base in a form that others read; base: as it was given; merged: the export to be measured."""
    from lora_export.validation.reference.foreign import as_peft

    readable, combined = as_peft(base, adapters, work), options.merge.combine != "none"
    how = options.export
    made = export_unmerged(trained_on, readable, work, how, merged, progress, combined=combined, worker=worker)
    return Control(*made, trained_on, readable)


def export_unmerged(
    trained_on: Path,
    adapters: Sequence[AdapterChoice],
    work: Path,
    options: ExportOptions,
    exported: ExportResult,
    progress: Progress,
    *,
    combined: bool,
    worker: "Worker | None" = None,
) -> tuple[ExportResult | None, tuple[str, ...]]:
    """The unmerged graph, or why there is none: it is a control, so a run goes on without it and says so."""
    from lora_export.onnx_export.quantize.settings import WORDS

    if exported.kind != "decoder":
        return None, ("no unmerged graph: the engine for this architecture exports merged models only",)
    if len(adapters) != 1 or adapters[0].weight != 1.0 or combined:
        return None, ("no unmerged graph: it takes exactly one adapter of weight 1, as it is",)
    try:
        what = "the unmerged model, the control of the benchmark"
        how = options.quantization  # the builder measures nothing, and its graph is only compared with
        named = replace(how, keep=tuple(k for k in how.keep if k not in WORDS))
        same = replace(options, engine=exported.engine, quantization=named)
        at, alone = work / "unmerged", adapters[0].folder
        return export_as(trained_on, at, same, progress, what, adapter=alone, worker=worker), ()
    except ExportError as error:
        progress.warn(f"no unmerged graph to compare with: {error.found}")
        return None, (f"no unmerged graph: {error.found}",)
