"""lora-export export: a Hugging Face folder to ONNX."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands import options
from lora_export.commands.talk import megabytes, table, talking

if TYPE_CHECKING:
    from lora_export.contracts import ExportOptions


@click.command("export")
@click.option("-m", "--model", required=True, metavar="MODEL", help="A merged folder, or any model.")
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER",
    help="Keep this LoRA out of the weights: MODEL is exported with slots, and ADAPTER.onnx_adapter is written, "
    "which onnxruntime (LoraAdapter) and onnxruntime-genai (Adapters) plug in as they run. Repeat it for more.",
)
@click.option(
    "--unmerged",
    is_flag=True,
    help="With one -a: the adapter as operators of its own, with its weights in the graph. For comparison: it is "
    "what merging saves.",
)
@options.output_option
@options.export_options
@options.graph_from_option
@options.shared_as_option
@options.provider_option
@options.dry_run_option
@options.force_option
@options.talk_options
def export(
    model: str, adapters: tuple[str, ...], unmerged: bool, output: Path, graph_from: Path | None,
    shared_as: str | None, dry_run: bool, force: bool, as_json: bool, quiet: bool, verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Export a model folder to ONNX: decoders for onnxruntime-genai, all others with Optimum's names.

    The graph does not depend on an adapter. With --graph-from, an earlier export of the same base gives the graph,
    byte for byte, and only the weights are written anew: at the speed of a copy, without loading the model. With
    --shared-as besides, OUT is a folder that many adapters share: base.bin, and for each adapter a graph and the
    weights that it changed.

    \b
        lora-export export -m ./base -o ./base-onnx
        lora-export export -m ./merged-a -o ./a-onnx --graph-from ./base-onnx
        lora-export export -m ./merged-b -o ./all --graph-from ./base-onnx --shared-as b    # all/b.onnx
        lora-export export -m ./base -a ./a -a ./b -o ./plug        # one graph, a.onnx_adapter, b.onnx_adapter
        lora-export export -m ./base -a ./a --unmerged -o ./slow    # to measure what merging saves
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export import api
        from lora_export.commands.gather import as_the_earlier, export_options_of
        from lora_export.workflows.exporting import check_export

        check_export(adapters, unmerged, graph_from, shared_as)
        if graph_from is not None:
            words = as_the_earlier(words)
        settings = export_options_of(words, force)
        if dry_run:
            document = _planned(model, settings, graph_from)
            rows = [*((k, str(v)) for k, v in document.items()), ("dry run", "nothing was written")]
            talk.result({"output": str(output), "dry_run": True} | document, table(rows))
            return
        result = api.export(
            model,
            output,
            adapters=adapters,
            unmerged=unmerged,
            graph_from=graph_from,
            shared_as=shared_as,
            options=settings,
            progress=talk.progress,
        )
        rows = [
            ("engine", result.engine),
            ("precision", result.precision),
            ("nodes", str(result.nodes)),
            *_fusions(result.fused_against_plain),
            ("time", f"{result.seconds:.1f} s"),
            *((name, megabytes(size)) for name, size in result.files.items()),
            ("output", str(output)),
        ]
        talk.result(result, table(rows))


def _fusions(difference: float | None) -> list[tuple[str, str]]:
    if difference is None:
        return []
    return [("fused graph", f"differs by {difference:.1e} from the plain one, relative, on made-up inputs")]


def _planned(model: str, options: "ExportOptions", earlier: Path | None) -> dict[str, Any]:
    from lora_export.checkpoint import open_checkpoint
    from lora_export.checkpoint.sources import resolve
    from lora_export.onnx_export import check_request, load_export
    from lora_export.workflows.exporting import target_of

    config = open_checkpoint(resolve(model).folder).config
    if earlier is not None:
        like = load_export(earlier)
        return {"engine": like.engine, "precision": like.precision, "graph_from": str(earlier)}
    target = target_of(options.provider)
    engine = check_request(config, options.precision, target, options.engine, options.quantization)
    return {"engine": engine, "precision": options.precision}
