"""lora-export validate: the merged model, and its ONNX export, against the unmerged one."""

import sys
from pathlib import Path
from typing import Any

import click

from lora_export.commands import merging_options, options
from lora_export.commands.talk import talking


@click.command("validate")
@options.base_option
@options.adapter_option
@click.option("-m", "--merged", required=True, type=options.FOLDER, help="The merged Hugging Face folder.")
@click.option(
    "--onnx",
    type=options.FOLDER,
    multiple=True,
    help="An ONNX folder that was exported from it, or the graph of an adapter in a shared one. Repeat it for "
    "other precisions, to be told the smallest one that keeps the adapter.",
)
@click.option(
    "--base-onnx",
    type=options.FOLDER,
    multiple=True,
    help="The base exported the same way, for the noise floor; one for each --onnx.  [default: exported anew, then "
    "deleted]",
)
@click.option(
    "--own-text",
    "own_texts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Several adapters: a text for each -a, in the same order. What the merged model has left of what each "
    "adapter does alone is measured on its own text.",
)
@options.bases_options
@merging_options.merge_options
@options.provider_option
@options.check_options
@options.talk_options
def validate(
    base: str, adapters: tuple[str, ...], merged: Path, onnx: tuple[Path, ...], base_onnx: tuple[Path, ...],
    own_texts: tuple[Path, ...], provider: Any, prompts: Path | None, text: Path | None, rows: int,
    tolerance: float, min_survival: float, as_json: bool, quiet: bool, verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Compare a merged folder with PEFT's unmerged forward in fp32. Exit code 3 if a check fails.

    The merged model is judged in fp32 arithmetic, as it will be loaded (its own type, names that begin with
    loaded_) and, with --onnx, as an exported graph (onnx_). Every tensor is also recomputed in float64 from base
    and adapter (see --rows), because model outputs alone cannot show a fine fault. Thresholds are --tolerance times
    a noise floor that is measured in PyTorch on the unmerged model. The numbers of an exported graph are compared
    with the merged folder, and its arithmetic with PyTorch on just these numbers. If a check fails, the first
    module that goes wrong is named. Give the options of the merge again: they decide which base is the truth.

    Decoders, text encoders with any head, encoder-decoders, vision, audio and two-tower models are each run on
    inputs of their own kind. Models that do not fit into memory, or into --max-memory if you give it, are read
    layer by layer: the same checks with the same figures, slower.

    \b
        lora-export validate -b BASE -a QLORA -m MERGED --training-quantization nf4 --compare-bases --requantize nf4
        lora-export validate -b BASE -a ADAPTER -m MERGED --onnx ONNX-int4 --onnx ONNX-int8 --onnx ONNX-fp16
        lora-export validate -b BASE -a A:0.7 -a B:0.3 --combine ties --density 0.2 -m MERGED \
            --own-text A.txt --own-text B.txt
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export import api
        from lora_export.commands import gather
        from lora_export.commands.words import validation_words
        from lora_export.contracts import ValidationOptions
        from lora_export.errors import EXIT_GATE
        from lora_export.workflows.gates import failures

        settings = ValidationOptions(
            merge=gather.merge_options_of(words),
            provider=provider,
            prompts=prompts,
            text=text,
            rows=rows,
            tolerance=tolerance,
            min_survival=min_survival,
            max_memory=gather.validation_memory_of(words),
            bases=gather.bases_of(words),
            seed=words["validation_seed"],
        )
        result = api.validate(
            base,
            gather.weighted(adapters),
            merged,
            onnx=onnx,
            base_onnx=base_onnx,
            own_texts=own_texts,
            options=settings,
            progress=talk.progress,
        )
        talk.result(result, validation_words(result))
        if not result.passed:
            click.echo(f"gate failed: {failures(result)}", err=True)
            sys.exit(EXIT_GATE)
