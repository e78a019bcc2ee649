"""The validation from its inputs to its checks."""

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.contracts import (
    AdapterChoice,
    Check,
    Deviation,
    ExportedPair,
    Progress,
    ValidationOptions,
    ValidationResult,
)
from lora_export.errors import InputError

if TYPE_CHECKING:
    from lora_export.validation.comparing.subject import Story
    from lora_export.validation.effect.bases import BasesFound
    from lora_export.validation.effect.precisions import SurvivalFound
    from lora_export.validation.graphs.exports import Judge


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
    from lora_export.validation.folder.companions import declared, expected_folder
    from lora_export.validation.folder.settings import settings_check
    from lora_export.validation.reference.foreign import as_peft

    options = seeded(options or ValidationOptions())
    _quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        asked_of_merge = declared(base, merged, options.merge)
        settings = expected_folder(base, adapters, merged, asked_of_merge, Path(scratch) / "settings")
        # An outline is no folder that anybody loads, and does not hold the tensors that its settings follow.
        checks = () if graphs_alone else (settings_check(settings, merged),)
        adapters = as_peft(base, adapters, Path(scratch))
        if options.merge.combine != "none":
            adapters, options = _combined(base, adapters, options, merged, dequantized, Path(scratch), progress)
        asked = base, adapters, merged, settings, exports, dequantized, graphs_alone, options, progress
        result = _validate(*asked, Path(scratch))
    return replace(result, checks=(*result.checks, *checks), seed=options.seed)


def seeded(options: ValidationOptions) -> ValidationOptions:
    """With a seed, drawn anew where none is given: nobody can know in advance what will be looked at."""
    return options if options.seed is not None else replace(options, seed=secrets.randbelow(2**31))


def _validate(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    settings: Path,
    exports: Sequence[ExportedPair],
    dequantized: Path | None,
    graphs_alone: bool,
    options: ValidationOptions,
    progress: Progress,
    scratch: Path,
) -> ValidationResult:
    """settings: a folder with the settings that `merged` should have; inputs are made by its tokenizer."""
    from lora_export.validation import kinds
    from lora_export.validation.comparing.prompts import read_prompts
    from lora_export.validation.comparing.subject import plain
    from lora_export.validation.comparing.text import read_text
    from lora_export.validation.effect.bases import Bases
    from lora_export.validation.effect.bases import check_request as check_bases
    from lora_export.validation.graphs.exports import Judge
    from lora_export.validation.reference.loading import load_merged, stored_dtypes
    from lora_export.validation.reference.memory import kept_bytes
    from lora_export.validation.reference.unmerged import load_unmerged

    keep = kept_bytes(merged, options.max_memory)
    if options.bases is not None:
        check_bases(options.bases, base, options.merge)
        _check_fits(keep)
    prompts, text = read_prompts(options.prompts), read_text(options.text)
    how = "loading" if keep is None else "streaming, layer by layer,"
    progress.stage(f"validate: {how} the unmerged model (PEFT, fp32) and the merged one")
    reference = load_unmerged(base, adapters, options.merge, dequantized, keep, scratch)
    unmerged, adapters = reference.model, reference.adapters
    if graphs_alone:
        model, dtypes = plain(unmerged), stored_dtypes(merged, unmerged)
    else:
        model, dtypes = load_merged(merged, reference.cls, reference.absent, keep)
    asked = prompts, options.prompts, progress, text, options.text, options.tolerance, options.seed or 0
    subject = kinds.Subject(plain(unmerged), settings, dtypes, *asked)
    story = kinds.choose(subject.model).story(subject)
    if options.bases is not None and not story.windows:
        raise _no_perplexity(base)

    judge = Judge(story, unmerged, merged, graphs_alone, keep, dtypes, options.provider)
    if graphs_alone:
        story.measure(unmerged)
        return _with_graphs(ValidationResult(()), judge, exports, options)
    as_loaded = merged if keep is None else None
    result = _judged(story, unmerged, model, dtypes, as_loaded, options, progress)
    result = replace(result, checks=(*result.checks, _stored(base, adapters, merged, unmerged, options)))
    if options.bases is not None:
        of_bases = options.bases, base, adapters, merged, unmerged, model, options.merge, dequantized
        result = _joined(result, Bases(*of_bases, story.windows, progress).compare())
    del model, subject
    return _with_graphs(result, judge, exports, options)


def _judged(
    story: Any,
    unmerged: Any,
    model: Any,
    dtypes: Mapping[str, Any],
    merged: Path | None,
    options: ValidationOptions,
    progress: Progress,
) -> ValidationResult:
    """The merged model by its tensors, by its outputs, and as it will be loaded from the folder `merged`.

    merged: None where it does not fit into the memory allowed. If a check fails, where it went wrong is looked for.
    """
    from lora_export.validation.reference.unused import advice, unused_updates

    result: ValidationResult = story.compare(unmerged, model)
    errors, checks = _tensors(unmerged, model, dtypes, options, progress)
    result = replace(result, checks=(*result.checks, *checks), weight_errors=errors)
    if merged is not None:
        result = _as_loaded(result, story, unmerged, merged, dtypes)
    else:
        progress.warn(
            "the merged model is not compared as it will be loaded: it does not fit into the memory allowed"
        )
    if result.passed:
        return result
    result = replace(result, deviation=_deviation(unmerged, model, story, dtypes, errors, options, progress))
    unused = unused_updates(unmerged, lambda: story.once(unmerged))
    return replace(result, unused_updates=unused, advice=(*result.advice, *([advice(unused)] if unused else ())))


def _combined(
    base: Path,
    adapters: Sequence[AdapterChoice],
    options: ValidationOptions,
    merged: Path,
    dequantized: Path | None,
    scratch: Path,
    progress: Progress,
) -> tuple[list[AdapterChoice], ValidationOptions]:
    """The combination as one adapter, and options that know of no combination."""
    from lora_export.validation.reference.combined import reference_adapter

    if streams(merged, options.max_memory) or options.bases is not None:
        raise InputError(
            "combined adapters are validated in memory, and without a comparison of bases",
            where=merged,
            expected="a model that fits into memory in fp32, three times",
            next_step="lora-export merge with the same options: its certificate checks the arithmetic",
        )
    progress.stage("validate: what each adapter does, asked of PEFT, and combined anew in float64")
    reference = reference_adapter(base, adapters, options.merge, dequantized, scratch)
    plain = replace(options.merge, combine="none", combine_on="deltas", density=None, svd_rank=None)
    return [reference], replace(options, merge=plain)


def _with_graphs(
    result: ValidationResult, judge: "Judge", exports: Sequence[ExportedPair], options: ValidationOptions
) -> ValidationResult:
    from lora_export.validation.effect.precisions import adapter_survival

    effects = []
    for pair in exports:
        judged = judge.judge(pair)
        result = replace(result, checks=(*result.checks, *judged.checks))
        effects.append((pair, judged.effect))
    if not effects:
        return result
    return _joined(result, adapter_survival(effects, options.min_survival, options.again))


def streams(merged: Path, max_memory: int | None) -> bool:
    """Whether the models are too large for the memory, so that validation reads them layer by layer."""
    from lora_export.validation.reference.memory import kept_bytes

    return kept_bytes(merged, max_memory) is not None


def _check_fits(keep: int | None) -> None:
    if keep is not None:
        raise InputError(
            "the bases are compared in memory, and there is not enough of it for this model in fp32",
            expected="memory for the model in fp32, four times",
            next_step="the same command without --compare-bases, or on a larger machine; or a larger --max-memory",
        )


def _no_perplexity(base: Path) -> InputError:
    return InputError(
        "the bases are compared by perplexity, which an encoder has not",
        where=base / "config.json",
        expected="a decoder (…ForCausalLM)",
        next_step="the same command without --compare-bases, once with --base-weights original and once without",
    )


def _as_loaded(
    result: ValidationResult, story: "Story", unmerged: Any, merged: Path, dtypes: Mapping[str, Any]
) -> ValidationResult:
    """The same checks of a decoder in its own type, unless that is fp32."""
    from lora_export.validation.comparing.decoder import DecoderStory
    from lora_export.validation.reference.loaded import load_as_stored, own_type

    narrow, story = own_type(dtypes), getattr(story, "story", story)
    if narrow is None or not isinstance(story, DecoderStory):
        return result
    checks, perplexities = story.compare_loaded(unmerged, load_as_stored(merged), narrow)
    return replace(result, checks=(*result.checks, *checks), perplexities=(*result.perplexities, *perplexities))


def _deviation(
    unmerged: Any,
    model: Any,
    story: "Story",
    dtypes: Mapping[str, Any],
    errors: Sequence[str],
    options: ValidationOptions,
    progress: Progress,
) -> Deviation | None:
    from lora_export.validation.comparing.deviation import first_deviation

    progress.stage("validate: a check failed; looking for the first module that differs")
    return first_deviation(unmerged, model, lambda: story.once(unmerged), dtypes, errors, options.tolerance)


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


def _tensors(
    unmerged: Any, model: Any, dtypes: Any, options: ValidationOptions, progress: Progress
) -> tuple[tuple[str, ...], list[Check]]:
    from lora_export.validation.comparing.tensors import compare_tensors, verdict

    progress.stage("validate: recomputing tensors in float64")
    seed = options.seed or 0
    return verdict(compare_tensors(unmerged, model, dtypes, options.rows, seed=seed), seed)


def _stored(
    base: Path, adapters: Sequence[AdapterChoice], merged: Path, unmerged: Any, options: ValidationOptions
) -> Check:
    from lora_export import meta_model as skeleton
    from lora_export.validation.folder.companions import declared, replication
    from lora_export.validation.folder.stored import Changed, all_loaded_names, headers, stored_check, tied_names
    from lora_export.validation.reference.loading import whole_tensors
    from lora_export.validation.reference.probes import wrapped_modules
    from lora_export.validation.reference.trained import all_loaded_as, trained_as

    modules, trained = wrapped_modules(unmerged.base_model.model), trained_as(base, adapters, options.merge.task)
    names = all_loaded_as(trained.model, headers(merged)) if trained else all_loaded_names(base)
    tied = tied_names(trained.model if trained else skeleton.build(base))
    changed = Changed(tuple(modules), whole_tensors(adapters), names, tied)
    merge = declared(base, merged, options.merge)
    return stored_check(base, merged, changed, merge, bool(replication(adapters)), trained)


def _quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
