"""lora-export validate: the merged model, and its ONNX export, against the unmerged one."""

import sys
from pathlib import Path
from typing import Any

import click

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.talk import Talk
from lora_export.contracts.option import names
from lora_export.contracts.options import MergeOptions, ValidationOptions

OF_MERGE = names(MergeOptions, lambda how: how.json is not None)


@derive.command(
    "validate",
    derive.BASE,
    derive.ADAPTERS,
    Given("-m", "--merged", required=True, type=FOLDER, metavar="MERGED", help="The merged Hugging Face folder."),
    Given("--onnx", type=FOLDER, multiple=True,
          help="An ONNX folder that was exported from it, or the graph of an adapter in a shared one. Give "
          "several, in other precisions, to learn the smallest one that keeps the adapter."),
    Given("--base-onnx", type=FOLDER, multiple=True, default_text="exported anew, then deleted",
          help="The base exported the same way, for the noise floor; one for each --onnx."),
    Given("--own-text", "own_texts", type=FOLDER, multiple=True, metavar="FILE",
          help="Several adapters: a text for each -a, in the same order, on which is measured how much of that "
          "adapter's effect the merged model keeps."),
    derive.options_of(ValidationOptions, without=("merge", "max_memory")),
    derive.options_of(
        MergeOptions, only=OF_MERGE, hidden=[name for name in OF_MERGE if name != "max_memory"],
        max_memory={"default_text": "what the machine has",
                    "help": "Memory for the weights that validation compares, and for its arithmetic. Larger "
                    "models are read layer by layer: the same checks, slower."},
    ),
)  # fmt: skip
def validate(
    talk: Talk, base: str, adapters: tuple[str, ...], merged: Path, onnx: tuple[Path, ...],
    base_onnx: tuple[Path, ...], own_texts: tuple[Path, ...], **given: Any,
) -> None:  # fmt: skip
    """Compare a merged folder with PEFT's unmerged forward in fp32. Exit code 3 if a check fails.

    The merged model is judged in fp32 arithmetic, as it will be loaded (its own type, names that begin with
    loaded_) and, with --onnx, as an exported graph (onnx_). Every tensor is also recomputed in float64 from base
    and adapter (see --rows), because model outputs alone cannot show a small fault. Thresholds are --tolerance
    times a noise floor that is measured in PyTorch on the unmerged model. The numbers of an exported graph are
    compared with the merged folder, and its arithmetic with PyTorch on just these numbers. If a check fails, the
    first module that goes wrong is named.

    The certificate in MERGED says how it was merged, which decides which base is the truth. A folder that another
    tool merged has none: then say how with the options of `lora-export merge` (--base-weights,
    --training-quantization, --combine, --task, …). One that contradicts a certificate is refused.

    A pipeline of diffusers, or one of its models alone: each model that adapters change is compared with the base's
    model and the adapters beside its layers, on the same inputs, the denoiser at five timesteps; then the pictures
    that all models make together. --onnx takes one folder of its graphs for each precision.

    Decoders, text encoders with any head, encoder-decoders, vision, audio and two-tower models are each run on
    inputs of their own kind.

    \b
        lora-export validate -b BASE -a QLORA -m MERGED --compare-bases --requantize nf4
        lora-export validate -b BASE -a ADAPTER -m MERGED --onnx ONNX-int4 --onnx ONNX-int8 --onnx ONNX-fp16
        lora-export validate -b BASE -a A:0.7 -a B:0.3 -m MERGED --own-text A.txt --own-text B.txt
    """
    from lora_export import api
    from lora_export.commands.words import validation_words
    from lora_export.errors import EXIT_GATE
    from lora_export.pipeline import failures

    options = derive.build(
        ValidationOptions,
        given,
        max_memory=derive.memory_of_validation(),
        stated=derive.stated(MergeOptions, given),
    )
    result = api.validate(
        base,
        adapters,
        merged,
        onnx=onnx,
        base_onnx=base_onnx,
        own_texts=own_texts,
        options=options,
        progress=talk.progress,
    )
    talk.result(result, validation_words(result))
    if not result.passed:
        click.echo(f"gate failed: {failures(result)}", err=True)
        sys.exit(EXIT_GATE)
