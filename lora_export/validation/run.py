"""The validation from its inputs to its checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_export.contracts import (
    AdapterChoice,
    Check,
    MergeOptions,
    Progress,
    ValidationResult,
)


@dataclass(frozen=True)
class ValidationOptions:
    """prompts: a file with one prompt a line (None: built in). rows: how many rows of each updated tensor are
    recomputed in float64 (None: all). merge: the options of the merge, which decide which base is the truth.
    max_memory: bytes for the weights of both models (None: as the machine has); larger models are streamed."""

    prompts: Path | None = None
    rows: int | None = 64
    provider: str = "auto"
    merge: MergeOptions = field(default_factory=MergeOptions)
    max_memory: int | None = None


def validate(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    *,
    onnx: Path | None = None,
    base_onnx: Path | None = None,
    dequantized: Path | None = None,
    options: ValidationOptions | None = None,
    progress: Progress,
) -> ValidationResult:
    """Compare a merged folder, and an ONNX folder made from it, with the unmerged model in fp32.

    base_onnx: the base exported the same way, which measures the noise floor of the export; needed with onnx.
    dequantized: an fp32 copy of a base whose format transformers cannot load everywhere; it stands for the base.
    Needed, too, for any quantized base of a model that `streams`.
    """
    from lora_export.validation import kinds
    from lora_export.validation.memory import kept_bytes
    from lora_export.validation.prompts import read_prompts
    from lora_export.validation.reference import load_merged, load_unmerged

    options = options or ValidationOptions()
    prompts = read_prompts(options.prompts)
    _quiet_libraries()
    keep = kept_bytes(merged, options.max_memory)
    how = "loading" if keep is None else "streaming, layer by layer,"
    progress.stage(f"validate: {how} the unmerged model (PEFT, fp32) and the merged one")
    reference = load_unmerged(base, adapters, options.merge, dequantized, keep)
    unmerged = reference.model
    model, dtypes = load_merged(merged, reference.cls, reference.absent, keep)
    errors, checks = _tensors(unmerged, model, dtypes, options, progress)
    subject = kinds.Subject(model, merged, dtypes, prompts, options.prompts, progress)
    story = kinds.choose(model).story(subject)
    result: ValidationResult = story.compare(unmerged, model)
    result = replace(result, checks=(*result.checks, *checks), weight_errors=errors)
    if onnx is not None:
        del model
        assert base_onnx is not None, "an ONNX model is judged against the base exported the same way"
        extra = story.compare_onnx(onnx / "model.onnx", base_onnx / "model.onnx", options.provider)
        result = replace(result, checks=(*result.checks, *extra))
    return result


def streams(merged: Path, max_memory: int | None) -> bool:
    """Whether the models are too large for the memory, so that validation reads them layer by layer."""
    from lora_export.validation.memory import kept_bytes

    return kept_bytes(merged, max_memory) is not None


def _tensors(
    unmerged: Any, model: Any, dtypes: Any, options: ValidationOptions, progress: Progress
) -> tuple[tuple[str, ...], list[Check]]:
    from lora_export.validation.tensors import compare_tensors
    from lora_export.validation.thresholds import tensor_checks

    progress.stage("validate: recomputing tensors in float64")
    errors = compare_tensors(unmerged, model, dtypes, options.rows)
    faulty = sorted((e for e in errors if not e.worst <= 1), key=lambda e: -e.worst)
    worst = max((e.worst for e in errors), default=0.0)
    # JSON has no infinity; a tensor that differs where nothing may is told by the largest float.
    checks = tensor_checks(min(worst, 1.7e308), len(faulty), len(errors))
    return tuple(e.name for e in faulty), checks


def _quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
