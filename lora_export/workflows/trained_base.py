"""The base that an adapter was trained on, in a form that others can read."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.checkpoint.companions import module_files
from lora_export.contracts import (
    AdapterChoice,
    MergeOptions,
    Progress,
)
from lora_export.folder_files import SENTENCE, SENTENCE_MODULES
from lora_export.workflows.bare_base import link


def modules_from(base: Path, adapters: Sequence[AdapterChoice]) -> Path:
    """The folder whose sentence-transformers' modules the merged model has: the last adapter that brings some."""
    homes = [base, *(a.folder for a in adapters)]
    return next((home for home in reversed(homes) if (home / SENTENCE_MODULES).is_file()), base)


def prepared_base(
    base: Path, adapters: Sequence[AdapterChoice], options: MergeOptions, work: Path, progress: Progress
) -> Path:
    """The folder of the base that the adapter belongs to: itself, or a copy in `work`, dequantized, or with the
    adapter's head or sentence-transformers' modules where it has none."""
    from lora_export.merging import headed_base, merge, plan

    weights, home = work / "base-weights", modules_from(base, adapters)
    base = base if home == base else _with_modules(base, home, work)
    if headed_base(base, adapters, weights, options, progress):
        return weights
    planned = plan(base, [], replace(options, dtype="keep"))
    if planned.counts["dequantized"] == 0:
        return base
    merge(base, [], weights, replace(options, dtype="keep", force=True), progress)
    return weights


def _with_modules(base: Path, home: Path, work: Path) -> Path:
    """The base with the modules of an adapter's folder; its own files are linked."""
    folder = work / "base-modules"
    for path in (p for p in base.iterdir() if p.is_file() and p.name not in SENTENCE):
        link(path, base, folder)
    for path in (*(home / name for name in sorted(SENTENCE)), *module_files(home)):
        if path.is_file():
            link(path, home, folder)
    return folder


def stand_in(
    base: Path, merged: Path, options: MergeOptions, max_memory: int | None, work: Path, progress: Progress
) -> Path | None:
    """An fp32 copy of a quantized base, for validation, unless bitsandbytes itself can dequantize it there.

    max_memory: bytes for the weights that validation compares; None: as there is.
    """
    from lora_export.checkpoint import open_checkpoint
    from lora_export.merging import merge
    from lora_export.quantization import method_here, with_settings
    from lora_export.validation import streams
    from lora_export.validation.reference import second_reader

    checkpoint = open_checkpoint(base)
    on_the_fly = options.training_quantization != "none" and options.base_weights == "dequantized"
    method = method_here(checkpoint, with_settings(base, checkpoint.config)) or (
        "bitsandbytes" if on_the_fly else None
    )
    if method is None or (method == "bitsandbytes" and not streams(merged, max_memory)):
        return None
    made = merge(base, [], work / "stand-in", replace(options, dtype="float32"), progress).output
    read_again = second_reader.compare(base, made) if method == second_reader.METHOD else None
    if read_again is None or read_again.not_read:
        some = "" if read_again is None or not read_again.compared else f"{read_again.not_read} of the "
        progress.warn(
            f"{some}{method} weights are read by this tool alone: validation checks what was merged into them, "
            "not how they were read"
        )
    if read_again is not None and read_again.compared:
        progress.detail(f"{read_again.compared} weights of the base are the same as {method} itself reads them")
    return made
