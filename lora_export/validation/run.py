"""The validation from its inputs to its checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.contracts import (
    MIN_SURVIVAL,
    AdapterChoice,
    Check,
    CompareBases,
    ExportedPair,
    MergeOptions,
    Progress,
    ValidationResult,
)
from lora_export.errors import InputError

if TYPE_CHECKING:
    from lora_export.validation.bases import BasesFound
    from lora_export.validation.precisions import SurvivalFound


@dataclass(frozen=True)
class ValidationOptions:
    """prompts: a file with one prompt a line (None: built in). rows: how many rows of each updated tensor are
    recomputed in float64 (None: all). merge: the options of the merge, which decide which base is the truth.
    min_survival: the share of the adapter's effect that an ONNX graph has to keep. bases: compare the bases that a
    QLoRA adapter could be merged into. again: the command that tries another precision, {precision} in it."""

    prompts: Path | None = None
    rows: int | None = 64
    provider: str = "auto"
    merge: MergeOptions = field(default_factory=MergeOptions)
    min_survival: float = MIN_SURVIVAL
    bases: CompareBases | None = None
    again: str = "the same command with --precision {precision}"


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

    options = options or ValidationOptions()
    if options.bases is not None:
        check_bases(options.bases, base, options.merge)
    prompts = read_prompts(options.prompts)
    _quiet_libraries()
    progress.stage("validate: loading the unmerged model (PEFT, fp32) and the merged one")
    unmerged = reference.attach_adapters(reference.load_base(base, options.merge, dequantized), adapters)
    model, dtypes = reference.load_merged(merged)
    decoder = _is_decoder(model)
    if options.bases is not None and not decoder:
        raise _no_perplexity(base)
    errors, checks = _tensors(unmerged, model, dtypes, options, progress)
    tokenizer = _tokenizer(merged)
    vocabulary = _embedding_rows(model)
    tokens = tokenize(tokenizer, prompts, vocabulary)
    if not tokens:
        raise InputError("no prompt has two tokens or more", where=options.prompts or "built-in prompts")
    story = _story(model, tokens, tokenizer, dtypes, prompts, progress)
    result: ValidationResult = story.compare(unmerged, model)
    result = replace(result, checks=(*result.checks, *checks), weight_errors=errors)
    if options.bases is not None:
        compared = Bases(
            options.bases, base, adapters, merged, unmerged, model, options.merge, dequantized, tokens, progress
        )
        result = _joined(result, compared.compare())
    del model
    for pair in exports:
        result = replace(result, checks=(*result.checks, *_onnx_checks(story, pair, options.provider)))
    if exports and decoder:
        found = adapter_survival(
            unmerged, exports, tokens, options.provider, options.min_survival, options.again, progress
        )
        result = _joined(result, found)
    return result


def _onnx_checks(story: Any, pair: ExportedPair, provider: str) -> list[Check]:
    checks = story.compare_onnx(pair.merged / "model.onnx", pair.base / "model.onnx", provider)
    return [replace(c, name=pair.prefix + c.name.removeprefix("onnx_")) for c in checks]


def _joined(result: ValidationResult, found: "BasesFound | SurvivalFound") -> ValidationResult:
    """A perplexity that two comparisons took of the same model on the same text is kept once."""
    known = {p.model for p in result.perplexities}
    more = tuple(p for p in found.perplexities if p.model not in known)
    result = replace(
        result,
        perplexities=(*result.perplexities, *more),
        adapter_survival=(*result.adapter_survival, *found.adapter_survival),
        advice=(*result.advice, *found.advice),
    )
    return replace(
        result,
        checks=(*result.checks, *getattr(found, "checks", ())),
        bases=(*result.bases, *getattr(found, "bases", ())),
    )


def _is_decoder(model: Any) -> bool:
    return model.get_output_embeddings() is not None and getattr(model, "can_generate", lambda: False)()


def _no_perplexity(base: Path) -> InputError:
    return InputError(
        "the bases are compared by perplexity, which an encoder has not",
        where=base / "config.json",
        expected="a decoder (…ForCausalLM)",
        next_step="the same command without --compare-bases, once with --base-weights original and once without",
    )


def _story(
    model: Any, tokens: Any, tokenizer: Any, dtypes: Any, prompts: tuple[str, ...], progress: Progress
) -> Any:
    from lora_export.validation.decoder_story import DecoderStory
    from lora_export.validation.encoder_story import EncoderStory

    if _is_decoder(model):
        return DecoderStory(tokens, tokenizer, dtypes, progress)
    return EncoderStory(tokens, dtypes, progress)


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
