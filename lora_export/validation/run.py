"""The validation from its inputs to its checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.contracts import (
    MIN_SURVIVAL,
    AdapterChoice,
    Check,
    Deviation,
    MergeOptions,
    Perplexity,
    Progress,
    ValidationResult,
)
from lora_export.errors import InputError

if TYPE_CHECKING:
    from lora_export.validation.bases import BasesFound
    from lora_export.validation.precisions import SurvivalFound


@dataclass(frozen=True)
class ValidationOptions:
    """prompts: a file with one prompt a line; text: a file of running text for the perplexities (None: built in).
    rows: how many rows of each updated tensor are recomputed in float64 one by one (None: all). merge: the options
    of the merge, which decide which base is the truth. tolerance: thresholds are this many noise floors.
    precision: of the ONNX weights, for the words."""

    prompts: Path | None = None
    text: Path | None = None
    rows: int | None = 64
    provider: str = "auto"
    merge: MergeOptions = field(default_factory=MergeOptions)
    tolerance: float = 4.0
    precision: str | None = None


def validate(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    *,
    exports: Sequence[ExportedPair] = (),
    dequantized: Path | None = None,
    options: ValidationOptions | None = None,
    progress: Progress,
) -> ValidationResult:
    """Compare a merged folder, and ONNX graphs made from it, with the unmerged model in fp32.

    dequantized: an fp32 copy of a base whose format transformers cannot load everywhere; it stands for the base.
    """
    from lora_export.validation import reference
    from lora_export.validation.bases import Bases
    from lora_export.validation.bases import check_request as check_bases
    from lora_export.validation.decoders import tokenize
    from lora_export.validation.precisions import adapter_survival
    from lora_export.validation.prompts import read_prompts
    from lora_export.validation.text import read_text

    options = options or ValidationOptions()
    prompts, text = read_prompts(options.prompts), read_text(options.text)
    _quiet_libraries()
    progress.stage("validate: loading the unmerged model (PEFT, fp32) and the merged one")
    unmerged = reference.attach_adapters(reference.load_base(base, options.merge, dequantized), adapters)
    model, dtypes = reference.load_merged(merged)
    decoder = _is_decoder(model)
    if options.bases is not None and not decoder:
        raise _no_perplexity(base)
    errors, checks = _tensors(unmerged, model, dtypes, options, progress)
    tokenizer = _tokenizer(merged)
    tokens = tokenize(tokenizer, prompts, _embedding_rows(model))
    if not tokens:
        raise InputError("no prompt has two tokens or more", where=options.prompts or "built-in prompts")
    story = _story(model, tokens, tokenizer, dtypes, text, options, progress)
    result: ValidationResult = story.compare(unmerged, model)
    result = replace(result, checks=(*result.checks, *checks), weight_errors=errors)
    result = _as_loaded(result, story, unmerged, merged, dtypes)
    if not result.passed:
        result = replace(result, deviation=_deviation(unmerged, model, story, dtypes, errors, options, progress))
    if onnx is not None:
        del model
        assert base_onnx is not None, "an ONNX model is judged against the base exported the same way"
        files = onnx / "model.onnx", base_onnx / "model.onnx"
        result = _with(result, *story.compare_onnx(*files, options.provider, options.precision))
    return result


def _with(
    result: ValidationResult, checks: Sequence[Check], perplexities: Sequence[Perplexity]
) -> ValidationResult:
    return replace(result, checks=(*result.checks, *checks), perplexities=(*result.perplexities, *perplexities))


def _as_loaded(
    result: ValidationResult, story: Any, unmerged: Any, merged: Path, dtypes: Mapping[str, Any]
) -> ValidationResult:
    """The same checks of a decoder in its own type, unless that is fp32."""
    from lora_export.validation.decoder_story import DecoderStory
    from lora_export.validation.loaded import load_as_stored, own_type

    narrow = own_type(dtypes)
    if narrow is None or not isinstance(story, DecoderStory):
        return result
    return _with(result, *story.compare_loaded(unmerged, load_as_stored(merged), narrow))


def _deviation(
    unmerged: Any,
    model: Any,
    story: Any,
    dtypes: Mapping[str, Any],
    errors: Sequence[str],
    options: ValidationOptions,
    progress: Progress,
) -> Deviation | None:
    from lora_export.validation.deviation import first_deviation

    progress.stage("validate: a check failed; looking for the first module that differs")
    return first_deviation(unmerged, model, lambda: story.once(unmerged), dtypes, errors, options.tolerance)


def _story(
    model: Any,
    tokens: Any,
    tokenizer: Any,
    dtypes: Any,
    text: str,
    options: ValidationOptions,
    progress: Progress,
) -> Any:
    from lora_export.validation.decoder_story import DecoderStory
    from lora_export.validation.encoder_story import EncoderStory
    from lora_export.validation.text import windows

    if model.get_output_embeddings() is not None and getattr(model, "can_generate", lambda: False)():
        pieces = windows(tokenizer, text, _embedding_rows(model), options.text)
        return DecoderStory(tokens, tokenizer, dtypes, progress, options.tolerance, pieces)
    return EncoderStory(tokens, dtypes, progress, options.tolerance)


def _tensors(
    unmerged: Any, model: Any, dtypes: Any, options: ValidationOptions, progress: Progress
) -> tuple[tuple[str, ...], list[Check]]:
    from lora_export.validation.tensors import compare_tensors, verdict

    progress.stage("validate: recomputing tensors in float64")
    return verdict(compare_tensors(unmerged, model, dtypes, options.rows))


def _embedding_rows(model: Any) -> int:
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}",
            where=folder,
            expected="tokenizer.json or the files of a known tokenizer",
        ) from None


def _quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
