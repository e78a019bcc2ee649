"""A model folder to ONNX: anew, with an earlier export's graph, or with its adapters left outside."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.choices import Provider
from lora_export.contracts import AdapterChoice, ExportOptions, ExportResult, MergeOptions, Progress, Source
from lora_export.errors import InputError
from lora_export.workflows.held_out import refuse_other_calibration


def export_model(
    model: Source, output: Path, adapters: Sequence[AdapterChoice], options: ExportOptions, progress: Progress
) -> ExportResult:
    """Write `model` as ONNX into the new folder `output`, or with `shared_as` into one that adapters share.

    adapters: stay outside, as .onnx_adapter files of a graph with slots; or, with `unmerged`, the only one of them
    becomes operators of the graph. `check_export` has said what goes together.
    """
    from lora_export.checkpoint.pipeline import is_pipeline
    from lora_export.onnx_export import export, reweight, share
    from lora_export.onnx_export.engines.isolated import Worker
    from lora_export.workflows.pipelines.exporting import export_pipeline_folder
    from lora_export.workflows.pluggable import export_pluggable
    from lora_export.workflows.proving import WARM, prover

    if is_pipeline(model.folder):
        return export_pipeline_folder(model.folder, output, len(adapters), options, progress)
    if options.graph_from is not None and options.shared_as is not None:
        earlier, name = options.graph_from, options.shared_as
        return share(earlier, model.folder, output, name, force=options.force, progress=progress)
    if options.graph_from is not None:
        return reweight(options.graph_from, model.folder, output, force=options.force, progress=progress)
    with Worker() as worker:
        worker.warm(*WARM)  # while this process looks at the model
        options = replace(options, provider=_target(options.provider))
        options = knowing_touched(options, model.folder, adapters)
        if adapters and not options.unmerged:
            return export_pluggable(model.folder, [a.folder for a in adapters], output, options, progress, worker)
        return export(
            model.folder,
            output,
            options,
            adapter=adapters[0].folder if options.unmerged else None,
            prove=prover(options.proof),
            worker=worker,
            progress=progress,
        )


def check_export(adapters: int, options: ExportOptions) -> None:
    """InputError for what does not go together. adapters: how many there are."""
    if options.graph_from is not None and adapters:
        raise InputError(
            "--adapter with --graph-from",
            expected="a merged MODEL with --graph-from, or a base and the adapters that stay outside of it",
        )
    if options.unmerged and adapters != 1:
        raise InputError(
            f"--unmerged with {adapters} adapters",
            expected="one adapter, which becomes part of the graph",
            next_step="lora-export export -m BASE -a ADAPTER --unmerged -o OUT",
        )
    if options.graph_from is None and options.shared_as is not None:
        raise InputError(
            "--shared-as without --graph-from",
            expected="an export of the base, whose graph and weights the adapters share",
            next_step="lora-export export -m BASE -o BASE_ONNX, then --graph-from BASE_ONNX",
        )
    refuse_other_calibration(options)


def planned_export(model: str, options: ExportOptions) -> dict[str, Any]:
    """The engine and the precision that an export will have; refuses what can be refused from config.json."""
    from lora_export.checkpoint import open_checkpoint
    from lora_export.checkpoint.pipeline import is_pipeline
    from lora_export.checkpoint.sources import resolve
    from lora_export.onnx_export import check_request, load_export
    from lora_export.onnx_export.embedders import as_exported
    from lora_export.onnx_export.refusals import refuse_untold
    from lora_export.workflows.pipelines.exporting import planned_pipeline_export

    folder = resolve(model).folder
    if is_pipeline(folder):
        return planned_pipeline_export(folder, options)
    config = as_exported(open_checkpoint(folder).config, folder)
    if options.graph_from is not None:
        like = load_export(options.graph_from)
        return {"engine": like.engine, "precision": like.precision, "graph_from": str(options.graph_from)}
    refuse_untold(knowing_touched(options, folder).quantization, folder)
    provider = _target(options.provider)
    engine = check_request(config, options.precision, provider, options.engine, options.quantization)
    return {"engine": engine, "precision": options.precision}


def knowing_touched(
    options: ExportOptions, model: Path, adapters: Sequence[AdapterChoice] = (), merge: MergeOptions | None = None
) -> ExportOptions:
    """With the tensors that adapters change, where options ask: of a base and `adapters`, or of a merged folder by
    its certificate. None are known of a folder without one, or of `options.graph_from`."""
    from lora_export.merging import CERTIFICATE, plan
    from lora_export.merging.certificate.document import read_certificate

    how = options.quantization
    if "touched" not in how.keep or options.graph_from is not None:
        return options
    touched: tuple[str, ...] = ()
    if adapters:
        touched = plan(model, adapters, merge or MergeOptions()).touched
    elif (model / CERTIFICATE).is_file():
        touched = read_certificate(model).touched
    return replace(options, quantization=replace(how, touched=touched))


def _target(provider: Provider) -> Provider:
    """The provider that a graph is made for: a graph for CUDA can be made where there is none."""
    from lora_export.runtime import resolve_provider

    return provider if provider == "cuda" else resolve_provider(provider)
