"""A model folder to ONNX: anew, with an earlier export's graph, or with its adapters left outside."""

from collections.abc import Sequence
from pathlib import Path

from lora_export.contracts import ExportOptions, ExportResult, Progress, Source
from lora_export.errors import InputError


def export_model(
    model: Source,
    output: Path,
    adapters: Sequence[Source],
    options: ExportOptions,
    progress: Progress,
    *,
    unmerged: bool = False,
    graph_from: Path | None = None,
    shared_as: str | None = None,
) -> ExportResult:
    """Write `model` as ONNX into the new folder `output`, or with `shared_as` into one that adapters share.

    adapters: stay outside, as .onnx_adapter files of a graph with slots; or, with `unmerged`, the only one of them
    is in the graph as operators of its own. graph_from: an earlier export of the same base, whose graph and options
    hold. What goes together is for `check_export` to say, before anything is looked for.
    """
    from lora_export.onnx_export import export, reweight, share
    from lora_export.workflows.pluggable import export_pluggable

    if graph_from is not None and shared_as is not None:
        return share(graph_from, model.folder, output, shared_as, force=options.force, progress=progress)
    if graph_from is not None:
        return reweight(graph_from, model.folder, output, force=options.force, progress=progress)
    if adapters and not unmerged:
        return export_pluggable(
            model,
            adapters,
            output,
            precision=options.precision,
            provider=target_of(options.provider),
            engine=options.engine,
            quantization=options.quantization,
            force=options.force,
            progress=progress,
        )
    return export(
        model.folder,
        output,
        precision=options.precision,
        provider=target_of(options.provider),
        engine=options.engine,
        optimize=options.optimize,
        quantization=options.quantization,
        adapter=adapters[0].folder if unmerged else None,
        against_plain=not unmerged,
        force=options.force,
        progress=progress,
    )


def check_export(
    adapters: Sequence[object], unmerged: bool, graph_from: Path | None, shared_as: str | None
) -> None:
    """InputError for what does not go together."""
    if graph_from is not None and adapters:
        raise InputError(
            "--adapter beside --graph-from",
            expected="a merged MODEL with --graph-from, or a base and the adapters that stay outside of it",
        )
    if unmerged and len(adapters) != 1:
        raise InputError(
            f"--unmerged with {len(adapters)} adapters",
            expected="one adapter, which the graph has in it",
            next_step="lora-export export -m BASE -a ADAPTER --unmerged -o OUT",
        )
    if graph_from is None and shared_as is not None:
        raise InputError(
            "--shared-as without --graph-from",
            expected="an export of the base, whose graph and weights the adapters share",
            next_step="lora-export export -m BASE -o BASE_ONNX, then --graph-from BASE_ONNX",
        )


def target_of(provider: str) -> str:
    """The provider that a graph is made for: a graph for CUDA can be made where there is none."""
    from lora_export.runtime import resolve_provider

    return provider if provider == "cuda" else resolve_provider(provider)
