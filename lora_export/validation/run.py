"""The validation from its inputs to its checks."""

import contextlib
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import AdapterChoice, ExportedPair, Progress, ValidationOptions, ValidationResult
from lora_export.storage.memory import importing

if TYPE_CHECKING:
    from lora_export.validation.known import KnownBase
    from lora_export.validation.stages import Validation


def prepare() -> None:
    """Import what a validation needs, which takes seconds: torch, transformers and PEFT."""
    with importing("peft"):
        from lora_export.validation import stages  # noqa: F401


def validate(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    *,
    exports: Sequence[ExportedPair] = (),
    dequantized: Path | None = None,
    graphs_alone: bool = False,
    options: ValidationOptions | None = None,
    known: "KnownBase | None" = None,
    progress: Progress,
) -> ValidationResult:
    """Compare a merged folder, and ONNX graphs made from it, with the unmerged model in fp32.

    dequantized: an fp32 copy of a base whose format transformers cannot load everywhere; it stands for the base.
    Needed, too, for any quantized base of a model that `streams`. graphs_alone: `merged` is an outline without
    numbers, and only the graphs are compared. known: where answers that depend on the base alone are kept for the
    next validation, and taken from; None computes all of them.
    """
    from lora_export.validation.folder.settings import settings_check
    from lora_export.validation.stages import combined, result_of

    options = seeded(options or ValidationOptions())
    given = exports, dequantized, graphs_alone, options, progress
    with prepared(base, adapters, merged, *given, known) as task:
        # An outline is no folder that anybody loads, and does not hold the tensors that its settings follow.
        checks = () if graphs_alone else (settings_check(task.settings, merged),)
        result = result_of(task if options.merge.combine == "none" else combined(task))
    return replace(result, checks=(*result.checks, *checks), seed=options.seed)


@contextlib.contextmanager
def prepared(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    exports: Sequence[ExportedPair],
    dequantized: Path | None,
    graphs_alone: bool,
    options: ValidationOptions,
    progress: Progress,
    known: "KnownBase | None" = None,
) -> "Iterator[Validation]":
    """The inputs of a validation, read and checked."""
    import transformers

    from lora_export.validation.comparing.texts import read_prompts, read_text
    from lora_export.validation.folder.companions import declared, expected_folder
    from lora_export.validation.reference.foreign import as_peft
    from lora_export.validation.stages import Validation

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="lora-export-") as folder:
        scratch = Path(folder)
        how = declared(base, merged, options.merge)
        yield Validation(
            base=base,
            settings=expected_folder(base, adapters, merged, how, scratch / "settings"),
            adapters=as_peft(base, adapters, scratch),
            merged=merged,
            prompts=read_prompts(options.prompts),
            text=read_text(options.text),
            exports=exports,
            dequantized=dequantized,
            graphs_alone=graphs_alone,
            options=options,
            progress=progress,
            scratch=scratch,
            known=known,
        )


def seeded(options: ValidationOptions, shared: int | None = None) -> ValidationOptions:
    """With a seed; where none is given a new one is drawn, so that nobody knows in advance what is looked at.

    shared: that of all validations of one base, which then look at what is known of it.
    """
    if options.seed is not None:
        return options
    return replace(options, seed=secrets.randbelow(2**31) if shared is None else shared)


def streams(merged: Path, max_memory: int | None) -> bool:
    """Whether the models are too large for the memory, so that validation reads them layer by layer."""
    from lora_export.validation.reference.streaming import kept_bytes

    return kept_bytes(merged, max_memory) is not None
