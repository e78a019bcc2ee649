"""The validation from its inputs to its checks."""

import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.contracts import AdapterChoice, ExportedPair, Progress, ValidationOptions, ValidationResult


def validate(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    *,
    exports: Sequence[ExportedPair] = (),
    dequantized: Path | None = None,
    graphs_alone: bool = False,
    options: ValidationOptions | None = None,
    progress: Progress,
) -> ValidationResult:
    """Compare a merged folder, and ONNX graphs made from it, with the unmerged model in fp32.

    dequantized: an fp32 copy of a base whose format transformers cannot load everywhere; it stands for the base.
    Needed, too, for any quantized base of a model that `streams`. graphs_alone: `merged` is an outline without
    numbers, and only the graphs are compared.
    """
    import transformers

    from lora_export.validation.comparing.texts import read_prompts, read_text
    from lora_export.validation.folder.companions import declared, expected_folder
    from lora_export.validation.folder.settings import settings_check
    from lora_export.validation.reference.foreign import as_peft
    from lora_export.validation.stages import Validation, combined, result_of

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = seeded(options or ValidationOptions())
    with tempfile.TemporaryDirectory(prefix="lora-export-") as folder:
        scratch = Path(folder)
        settings = expected_folder(
            base, adapters, merged, declared(base, merged, options.merge), scratch / "settings"
        )
        # An outline is no folder that anybody loads, and does not hold the tensors that its settings follow.
        checks = () if graphs_alone else (settings_check(settings, merged),)
        task = Validation(
            base=base,
            adapters=as_peft(base, adapters, scratch),
            merged=merged,
            settings=settings,
            prompts=read_prompts(options.prompts),
            text=read_text(options.text),
            exports=exports,
            dequantized=dequantized,
            graphs_alone=graphs_alone,
            options=options,
            progress=progress,
            scratch=scratch,
        )
        result = result_of(task if options.merge.combine == "none" else combined(task))
    return replace(result, checks=(*result.checks, *checks), seed=options.seed)


def seeded(options: ValidationOptions) -> ValidationOptions:
    """With a seed; where none is given a new one is drawn, so that nobody knows in advance what is looked at."""
    return options if options.seed is not None else replace(options, seed=secrets.randbelow(2**31))


def streams(merged: Path, max_memory: int | None) -> bool:
    """Whether the models are too large for the memory, so that validation reads them layer by layer."""
    from lora_export.validation.reference.streaming import kept_bytes

    return kept_bytes(merged, max_memory) is not None
