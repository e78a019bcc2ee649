"""lora-export export: a Hugging Face folder to ONNX."""

from pathlib import Path
from typing import Any

import click

from lora_export.commands import options
from lora_export.commands.talk import megabytes, table, talking


@click.command("export")
@click.option("-m", "--model", required=True, metavar="MODEL", help="A merged folder, or any model.")
@options.output_option
@options.export_options
@options.graph_from_option
@options.provider_option
@options.dry_run_option
@options.force_option
@options.talk_options
def export(
    model: str, output: Path, graph_from: Path | None, dry_run: bool, force: bool, as_json: bool, quiet: bool,
    verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Export a model folder to ONNX: decoders for onnxruntime-genai, all others with Optimum's names.

    The graph does not depend on an adapter. With --graph-from, an earlier export of the same base gives the graph,
    byte for byte, and only the weights are written anew: at the speed of a copy, without loading the model.

    \b
        lora-export export -m ./base -o ./base-onnx
        lora-export export -m ./merged-a -o ./a-onnx --graph-from ./base-onnx
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.checkpoint.sources import resolve
        from lora_export.commands.gather import refuse_beside_graph_from

        folder = resolve(model).folder
        if graph_from is not None:
            refuse_beside_graph_from()
        if dry_run:
            document = _planned(folder, words, graph_from)
            rows = [*((k, str(v)) for k, v in document.items()), ("dry run", "nothing was written")]
            talk.result({"output": str(output), "dry_run": True} | document, table(rows))
            return
        if graph_from is not None:
            result = _reweighted(graph_from, folder, output, force, talk.progress)
        else:
            result = _exported(folder, output, words, force, talk.progress)
        rows = [
            ("engine", result.engine),
            ("precision", result.precision),
            ("nodes", str(result.nodes)),
            ("time", f"{result.seconds:.1f} s"),
            *((name, megabytes(size)) for name, size in result.files.items()),
            ("output", str(output)),
        ]
        talk.result(result.as_json(), table(rows))


def _planned(folder: Path, words: dict[str, Any], earlier: Path | None) -> dict[str, Any]:
    from lora_export.checkpoint import open_checkpoint
    from lora_export.onnx_export import check_request, load_export
    from lora_export.runtime import resolve_provider

    if earlier is not None:
        like = load_export(earlier)
        return {"engine": like.engine, "precision": like.precision, "graph_from": str(earlier)}
    config, precision = open_checkpoint(folder).config, words["precision"]
    engine = check_request(config, precision, resolve_provider(words["provider"]), words["engine"])
    return {"engine": engine, "precision": precision}


def _exported(folder: Path, output: Path, words: dict[str, Any], force: bool, progress: Any) -> Any:
    from lora_export.commands.gather import quantization_of
    from lora_export.onnx_export import export
    from lora_export.runtime import resolve_provider

    return export(
        folder,
        output,
        precision=words["precision"],
        provider=resolve_provider(words["provider"]),
        engine=words["engine"],
        optimize=words["optimize"],
        quantization=quantization_of(words),
        force=force,
        progress=progress,
    )


def _reweighted(earlier: Path, folder: Path, output: Path, force: bool, progress: Any) -> Any:
    from lora_export.onnx_export import reweight

    return reweight(earlier, folder, output, force=force, progress=progress)
