"""A merged pipeline against an unmerged one of our own: tensors, models, pictures, graphs."""

from collections.abc import Sequence
from pathlib import Path

from lora_export.contracts import (
    DiffusionAdapter,
    ExportedPipeline,
    Pipeline,
    Progress,
    ValidationOptions,
    ValidationResult,
)


def validate_pipeline(
    base: Pipeline,
    adapters: Sequence[DiffusionAdapter],
    merged: Pipeline,
    *,
    exports: Sequence[ExportedPipeline] = (),
    pictures: Path | None = None,
    options: ValidationOptions | None = None,
    progress: Progress,
) -> ValidationResult:
    """Compare the merged components, and ONNX graphs made from them, with the unmerged ones in fp32.

    base, merged: opened pipelines with the same components; adapters: understood, in the order of the merge, each
    with its weight; exports: ONNX folders of the merged pipeline; pictures: a folder that exists, into which PNG
    files are written, None for no files; options.merge: the options of the merge (variant, skip, dtype).
    InputError for a class that neither diffusers nor transformers has.
    """
    raise NotImplementedError
