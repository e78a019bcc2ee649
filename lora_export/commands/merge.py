"""lora-export merge: adapters into base weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_export.commands import derive
from lora_export.commands.plans import plan_document, plan_words
from lora_export.commands.talk import Talk, table
from lora_export.contracts.options import MergeOptions


@derive.command(
    "merge",
    derive.BASE,
    derive.ADAPTERS_OR_NONE,
    derive.OUTPUT,
    derive.options_of(MergeOptions),
    derive.DRY_RUN,
)
def merge(talk: Talk, base: str, adapters: tuple[str, ...], output: Path, dry_run: bool, **given: Any) -> None:
    """Merge adapters into their base and write a Hugging Face folder.

    The arithmetic is fp32 and rounded once. Tensors that the adapter does not touch are copied byte for byte, and
    so are tokenizer, chat template and generation config. A certificate says what happened to each tensor and how
    much of the adapter's change survived the rounding.

    A base with model_index.json is a pipeline of diffusers; an adapter may then be a single .safetensors file, with
    the names of kohya, diffusers, PEFT or another trainer. Components that it does not change are copied.

    Several adapters are applied one after the other, or become one change with --combine; how they interfere
    (cosines, conflicting signs, norms) is shown first, and in --dry-run. Without an adapter a quantized base is
    dequantized.

    \b
        lora-export merge -b BASE -a A:0.7 -a B:0.3 --combine ties --density 0.2 -o OUT
    """
    from lora_export import api
    from lora_export.commands.words import interference_lines, merge_rows
    from lora_export.errors import InputError

    options = derive.build(MergeOptions, given)
    if not adapters and not api.plan(base, adapters, options).computes:
        raise InputError(
            "no adapter is given, and this base is not quantized: there is nothing to merge",
            where=base,
            expected="an adapter, or a quantized base to dequantize",
            next_step="-a ADAPTER",
        )
    if dry_run:
        from lora_export.merging.pipelines.planning import interference_of

        planned = api.plan(base, adapters, options)
        pairs = interference_of(planned)
        document = plan_document(planned) | {"interference": [asdict(pair) for pair in pairs]}
        lines = [plan_words(planned), *interference_lines(pairs)]
        talk.result({"output": str(output)} | document, "\n".join(lines))
        return
    result = api.merge(base, adapters, output, options, progress=talk.progress)
    lines = [table([*merge_rows(result), ("output", str(output))]), *interference_lines(result.interference)]
    talk.result(result, "\n".join(lines))
