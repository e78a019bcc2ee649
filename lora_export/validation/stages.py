"""The stages of a validation: models loaded, compared, and judged by their outputs, tensors, files and graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_export import meta_model as skeleton
from lora_export.contracts import (
    AdapterChoice,
    Check,
    ExportedPair,
    Progress,
    ValidationOptions,
    ValidationResult,
)
from lora_export.errors import InputError
from lora_export.storage.memory import freed, reusing
from lora_export.storage.sealed import read_json
from lora_export.validation import kinds
from lora_export.validation.comparing import sentence
from lora_export.validation.comparing.comparison import Comparison
from lora_export.validation.comparing.decoder import DecoderComparison
from lora_export.validation.comparing.deviation import first_deviation, unused_advice, unused_updates
from lora_export.validation.comparing.tensors import compare_tensors, verdict
from lora_export.validation.comparing.tested_model import ModelUnderTest, plain
from lora_export.validation.effect.advice import Merged
from lora_export.validation.effect.bases import Bases, check_request
from lora_export.validation.effect.precisions import adapter_survival
from lora_export.validation.folder.companions import CERTIFICATE, declared, replication
from lora_export.validation.folder.stored import Changed, stored_check, tied_names
from lora_export.validation.graphs.exports import Judge
from lora_export.validation.known import Answers, KnownBase, of_model
from lora_export.validation.reference.combined import WITHOUT_A_RUN, reference_adapter
from lora_export.validation.reference.files import headers
from lora_export.validation.reference.loading import (
    load_as_stored,
    load_merged,
    own_type,
    stored_dtypes,
    whole_tensors,
)
from lora_export.validation.reference.probes import wrapped_modules
from lora_export.validation.reference.streaming import kept_bytes
from lora_export.validation.reference.trained import loaded_names, trained_as
from lora_export.validation.reference.unmerged import Unmerged, load_unmerged

AnyComparison = Comparison[Any, Any]


@dataclass(frozen=True)
class Validation:
    """What is validated, and how.

    adapters: such that PEFT loads; settings: a folder with the settings that `merged` should have, whose tokenizer
    makes the inputs; the rest as in `validate`; scratch: for files that are needed until the end.
    """

    base: Path
    adapters: Sequence[AdapterChoice]
    merged: Path
    settings: Path
    prompts: tuple[str, ...]
    text: str
    exports: Sequence[ExportedPair]
    dequantized: Path | None
    graphs_alone: bool
    options: ValidationOptions
    progress: Progress
    scratch: Path
    known: KnownBase | None = None


@dataclass(frozen=True)
class Models:
    """reference: PEFT's unmerged model; dtypes: stored types of the merged parameters; keep: bytes that each
    streamed model may keep in memory, None for models in memory; merged: in fp32, None before it is loaded, when it
    is needed no more, and where only graphs are compared."""

    reference: Unmerged
    dtypes: Mapping[str, Any]
    keep: int | None
    merged: Any = None

    @property
    def unmerged(self) -> Any:
        return self.reference.model


def result_of(task: Validation) -> ValidationResult:
    """Load both models, compare outputs, tensors and files, then the bases, then the graphs."""
    reusing()
    answers = Answers(task.scratch, task.progress, task.known)
    try:
        return _result_of(task, answers)
    finally:
        answers.end()


def _result_of(task: Validation, answers: Answers) -> ValidationResult:
    task, models = _loaded(task)
    comparison = _comparison(task, models, answers)
    if task.exports and isinstance(comparison, DecoderComparison):
        answers.rest()
        comparison.run_first(task.exports[0].merged_graphs, task.options.provider)
        freed()
    if not task.graphs_alone:
        models = _with_merged(task, models)
        comparison.dtypes = models.dtypes
    merged, result = Merged(own_type(models.dtypes)), ValidationResult(())
    if task.graphs_alone:
        comparison.measure(models.unmerged)
        return _with_graphs(result, task, models, comparison, merged)
    result = _judged(task, models, comparison)
    result = replace(result, checks=(*result.checks, _stored(task, models.unmerged)))
    if task.options.bases is not None:
        of_bases = task.options.bases, task.base, task.adapters, task.merged, models.unmerged, models.merged
        how = task.options.merge, task.dequantized, comparison.windows, task.progress
        result = joined(result, Bases(*of_bases, *how).compare())
    if task.exports:
        merged = _merged(merged, task, comparison.kept_by_merged(), result)
    models = replace(models, merged=None)  # frees its memory
    freed()
    return _with_graphs(result, task, models, comparison, merged)


def measured_by(task: Validation, scratch: Path) -> AnyComparison:
    """A comparison that knows what the unmerged model answers, which is loaded and left again here."""
    task, models = _loaded(task)
    comparison = _comparison(task, models, Answers(scratch, task.progress))
    comparison.recall(models.unmerged)
    return comparison


def combined(task: Validation) -> Validation:
    """With the combination as one adapter, and options that know of no combination."""
    merge = task.options.merge
    if kept_bytes(task.merged, task.options.max_memory) is not None or task.options.bases is not None:
        raise InputError(
            "combined adapters are validated in memory, and without a comparison of bases",
            where=task.merged,
            expected="a model that fits into memory in fp32, three times",
            next_step=WITHOUT_A_RUN,
        )
    task.progress.stage("validate: asking PEFT what each adapter does, and combining that again in float64")
    reference = reference_adapter(task.base, task.adapters, merge, task.dequantized, task.scratch)
    plain = replace(merge, combine="none", combine_on="deltas", density=None, svd_rank=None)
    return replace(task, adapters=[reference], options=replace(task.options, merge=plain))


def _loaded(task: Validation) -> tuple[Validation, Models]:
    """The unmerged model, and the task with the adapters as PEFT took them."""
    merge, keep = task.options.merge, kept_bytes(task.merged, task.options.max_memory)
    if task.options.bases is not None:
        check_request(task.options.bases, task.base, merge, streamed=keep is not None)
    how = "loading" if keep is None else "streaming, layer by layer,"
    task.progress.stage(f"validate: {how} the unmerged model (PEFT, fp32) and the merged one")
    kept = task.known.base if task.known is not None else None
    reference = load_unmerged(task.base, task.adapters, merge, task.dequantized, keep, task.scratch, kept)
    stored = stored_dtypes(task.merged, reference.model) if task.graphs_alone else {}
    dtypes = {**stored, **sentence.attach(reference.model, task.settings)}
    return replace(task, adapters=reference.adapters), Models(reference, dtypes, keep)


def _with_merged(task: Validation, models: Models) -> Models:
    reference = models.reference
    merged, dtypes = load_merged(task.merged, reference.cls, reference.absent, models.keep)
    sentence.attach(merged, task.merged)
    return replace(models, merged=merged, dtypes={**dtypes, **models.dtypes})


def _comparison(task: Validation, models: Models, answers: Answers) -> AnyComparison:
    """How models of this kind are compared, with the inputs for it, and what is known of the base."""
    options, model = task.options, plain(models.unmerged)
    inputs = task.settings, models.dtypes, task.prompts, task.text, options, task.progress
    if models.keep is not None:  # what is not in memory has no bytes to know it by
        answers.known = None
    elif answers.known is not None:
        answers.depends = of_model(model, models.reference.plain)
    subject = ModelUnderTest(model, *inputs, answers)
    comparison = kinds.choose(subject.model).comparison(subject)
    if options.bases is not None and not comparison.windows:
        raise InputError(
            "bases are compared by perplexity, which an encoder does not have",
            where=task.base / "config.json",
            expected="a decoder (…ForCausalLM)",
            next_step="run without --compare-bases, once with --base-weights original and once without it",
        )
    return comparison


def _judged(task: Validation, models: Models, comparison: AnyComparison) -> ValidationResult:
    """The merged model by its outputs, by its tensors, and as it will be loaded. If a check fails, the place where
    the models part is looked for."""
    unmerged, options, seed = models.unmerged, task.options, task.options.seed or 0
    result = comparison.compare(unmerged, models.merged)
    task.progress.stage("validate: recomputing tensors in float64")
    errors, checks = verdict(compare_tensors(unmerged, models.merged, models.dtypes, options.rows, seed=seed), seed)
    result = replace(result, checks=(*result.checks, *checks), weight_errors=errors)
    result = _as_loaded(result, task, models, comparison)
    if result.passed:
        return result
    task.progress.stage("validate: a check failed; looking for the first module that differs")
    once = partial(comparison.once, unmerged)
    deviation = first_deviation(unmerged, models.merged, once, models.dtypes, errors, options.tolerance)
    result, unused = replace(result, deviation=deviation), unused_updates(unmerged, once)
    return replace(
        result, unused_updates=unused, advice=(*result.advice, *([unused_advice(unused)] if unused else ()))
    )


def _as_loaded(
    result: ValidationResult, task: Validation, models: Models, comparison: AnyComparison
) -> ValidationResult:
    """The same checks of a decoder in its own type, unless that is fp32."""
    if models.keep is not None:
        task.progress.warn(
            "the merged model is not compared as it will be loaded: it does not fit into the memory allowed"
        )
        return result
    narrow = own_type(models.dtypes)
    if narrow is None or not isinstance(comparison, DecoderComparison):
        return result
    loaded = load_as_stored(task.merged)
    checks, perplexities = comparison.compare_loaded(models.unmerged, loaded, narrow)
    return replace(result, checks=(*result.checks, *checks), perplexities=(*result.perplexities, *perplexities))


def _stored(task: Validation, unmerged: Any) -> Check:
    base, adapters, merge = task.base, task.adapters, task.options.merge
    modules, trained = wrapped_modules(unmerged.base_model.model), trained_as(base, adapters, merge.task)
    model, stored = (trained.model, headers(task.merged)) if trained else (skeleton.build(base), headers(base))
    names = loaded_names(model, stored)
    changed = Changed(tuple(modules), whole_tensors(adapters), names, tied_names(model))
    merge = declared(base, task.merged, merge)
    return stored_check(base, task.merged, changed, merge, bool(replication(adapters)), trained)


def _merged(merged: Merged, task: Validation, kept: float | None, result: ValidationResult) -> Merged:
    """What the merged weights keep of the adapter, before any export."""
    certificate = task.merged / CERTIFICATE
    survival = read_json(certificate).get("delta_survival") if certificate.is_file() else None
    faults = tuple(
        c.name for c in result.checks if not c.passed and c.name in ("tensor_errors", "stored_tensors_differ")
    )
    return replace(merged, kept=kept, survival=survival if isinstance(survival, float) else None, faults=faults)


def _with_graphs(
    result: ValidationResult, task: Validation, models: Models, comparison: AnyComparison, merged: Merged
) -> ValidationResult:
    options = task.options
    judge = Judge(
        comparison, models.unmerged, task.merged, task.graphs_alone, models.keep, models.dtypes, options.provider
    )
    exports = []
    for pair in task.exports:
        exports.append(judge.judge(pair))
        result = replace(result, checks=(*result.checks, *exports[-1].checks))
    if not exports:
        return result
    return joined(result, adapter_survival(exports, options.least_survival, options.again, merged))


def joined(result: ValidationResult, more: ValidationResult) -> ValidationResult:
    """A perplexity that two comparisons took of the same model on the same text is kept once."""
    known = {p.model for p in result.perplexities}
    return replace(
        result,
        checks=(*result.checks, *more.checks),
        perplexities=(*result.perplexities, *(p for p in more.perplexities if p.model not in known)),
        adapter_survival=(*result.adapter_survival, *more.adapter_survival),
        bases=(*result.bases, *more.bases),
        advice=(*result.advice, *more.advice),
    )
