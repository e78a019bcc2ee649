"""lora-export validate: the merged model, and its ONNX export, against the unmerged one."""

import sys
from pathlib import Path
from typing import Any

import click

from lora_export.commands import options
from lora_export.commands.talk import talking


@click.command("validate")
@options.base_option
@options.adapter_option
@click.option("-m", "--merged", required=True, type=options.FOLDER, help="The merged Hugging Face folder.")
@click.option("--onnx", type=options.FOLDER, default=None, help="An ONNX folder that was exported from it.")
@click.option(
    "--base-onnx",
    type=options.FOLDER,
    default=None,
    help="The base exported the same way, for the noise floor.  [default: exported anew, then deleted]",
)
@options.merge_options
@options.provider_option
@options.check_options
@options.talk_options
def validate(
    base: str, adapters: tuple[str, ...], merged: Path, onnx: Path | None, base_onnx: Path | None,
    provider: Any, prompts: Path | None, rows: int, as_json: bool, quiet: bool, verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Compare a merged folder with PEFT's unmerged forward in fp32. Exit code 3 if a check fails.

    Every tensor is also recomputed in float64 from base and adapter (sampled rows, see --rows), because model
    outputs alone cannot show a fine fault. Thresholds come from a noise floor that is measured on the base
    without any adapter. Give the options of the merge again: they decide which base is the truth.

    Decoders, text encoders with any head, encoder-decoders, vision, audio and two-tower models are each run on
    inputs of their own kind. Models that do not fit into memory, or into --max-memory if you give it, are read
    layer by layer: the same checks with the same figures, slower.
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.checkpoint.sources import resolve
        from lora_export.commands import gather
        from lora_export.commands.words import validation_words
        from lora_export.errors import EXIT_GATE
        from lora_export.pipeline import StoryOptions, failures, validate_folder

        settings = StoryOptions(
            merge=gather.merge_options_of(words),
            provider=provider,
            prompts=prompts,
            rows=rows,
            validation_memory=gather.validation_memory_of(words),
        )
        result = validate_folder(
            resolve(base), gather.adapters_of(adapters), merged, onnx, base_onnx, settings, talk.progress
        )
        talk.result(result.as_json(), validation_words(result))
        if not result.passed:
            click.echo(f"gate failed: {failures(result)}", err=True)
            sys.exit(EXIT_GATE)
