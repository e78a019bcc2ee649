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
@options.provider_option
@options.dry_run_option
@options.force_option
@options.talk_options
def export(
    model: str, output: Path, precision: Any, provider: str, engine: str | None, dry_run: bool, force: bool,
    as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Export a model folder to ONNX: decoders for onnxruntime-genai, encoders with Optimum's names."""
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.checkpoint import open_checkpoint
        from lora_export.checkpoint.sources import resolve
        from lora_export.onnx_export import check_request
        from lora_export.onnx_export import export as export_folder
        from lora_export.runtime import resolve_provider

        folder = resolve(model).folder
        provider = resolve_provider(provider)
        if dry_run:
            checkpoint = open_checkpoint(folder)
            chosen = check_request(checkpoint.config, precision, provider, engine)
            document = {"output": str(output), "dry_run": True, "engine": chosen, "precision": precision}
            talk.result(
                document, table([("engine", chosen), ("precision", precision), ("dry run", "nothing was written")])
            )
            return
        result = export_folder(
            folder,
            output,
            precision=precision,
            provider=provider,
            engine=engine,
            force=force,
            progress=talk.progress,
        )
        rows = [
            ("engine", result.engine),
            ("precision", result.precision),
            ("nodes", str(result.nodes)),
            ("time", f"{result.seconds:.1f} s"),
            *((name, megabytes(size)) for name, size in result.files.items()),
            ("output", str(output)),
        ]
        talk.result(result.as_json(), table(rows))
