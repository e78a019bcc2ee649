"""The validation of a pipeline from its folders to its checks."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lora_export.contracts import (
    AdapterSurvival,
    Check,
    DiffusionAdapter,
    ExportedPipeline,
    Pipeline,
    Progress,
    ValidationOptions,
    ValidationResult,
)
from lora_export.errors import CheckpointError, InputError
from lora_export.runtime import resolve_provider
from lora_export.validation.comparing.logits import largest
from lora_export.validation.comparing.thresholds import reported
from lora_export.validation.pipelines.exported import (
    DENOISERS,
    Expected,
    Reference,
    expected_of,
    judge_export,
)
from lora_export.validation.pipelines.loading import class_of, load, quiet, stored_tensors
from lora_export.validation.pipelines.made_up import made_up_calls
from lora_export.validation.pipelines.models import DRAWS, Unmerged, all_rounded, all_without_adapters
from lora_export.validation.pipelines.outputs import (
    Floor,
    Outputs,
    SampleFloor,
    answers,
    apart,
    kept,
    psnr,
    rmse,
    widest,
)
from lora_export.validation.pipelines.pictures import save_pictures
from lora_export.validation.pipelines.sampling import Call, Sample, Sampler, open_sampler
from lora_export.validation.pipelines.second_opinion import second_opinion
from lora_export.validation.pipelines.tensors import files_check, tensor_checks
from lora_export.validation.pipelines.vectors import Vectors
from lora_export.validation.run import seeded

LOADS = "_loads"  # ends the name of a check that only a component which does not load gets
ROUNDING = "rounding errors of the merged weights, on the unmerged model"


@dataclass(frozen=True)
class Task:
    """What is validated; fields as in `validate_pipeline`."""

    base: Pipeline
    adapters: Sequence[DiffusionAdapter]
    merged: Pipeline
    exports: Sequence[ExportedPipeline]
    pictures: Path | None
    options: ValidationOptions
    progress: Progress

    @property
    def variant(self) -> str | None:
        return self.options.merge.variant

    def adapters_of(self, component: str) -> Sequence[DiffusionAdapter]:
        return () if component in self.options.merge.skip else self.adapters

    @property
    def seed(self) -> int:
        return self.options.seed or 0


@dataclass
class Known:
    """What the unmerged pipeline answered, which everything else is held against.

    calls: of each changed component; base, unmerged: its outputs for them; floors: how far rounding moves these;
    samples: pictures by the model's name; sampling: the floor of the pictures; exports: what graphs should answer.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    base: dict[str, list[Outputs]] = field(default_factory=dict)
    floors: dict[str, Floor] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    sampling: SampleFloor | None = None
    exports: list[Expected] = field(default_factory=list)


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
    InputError for a class that neither diffusers nor transformers has, or a pipeline without the base's components.
    """
    options = seeded(options or ValidationOptions())
    options = replace(options, provider=resolve_provider(options.provider) if exports else "cpu")
    task = Task(base, adapters, merged, exports, pictures, options, progress)
    with quiet(), torch.no_grad():
        _refuse_other_components(task)
        return replace(_validated(task), seed=options.seed)


def _refuse_other_components(task: Task) -> None:
    for component in task.base.components.values():
        class_of(component)
    other = task.base.components.keys() ^ task.merged.components.keys()
    if other:
        raise InputError(
            f"the pipelines differ in their components: {', '.join(sorted(other))}",
            where=task.merged.folder,
            expected=", ".join(task.base.components),
        )


def _validated(task: Task) -> ValidationResult:
    task.progress.stage("validate: loading the components, with the adapters beside their layers (fp32)")
    models = {
        name: Unmerged.of(component, task.adapters_of(name), task.variant)
        for name, component in task.base.components.items()
    }
    task.progress.stage("validate: recomputing tensors in float64")
    errors, checks = _tensors(task, models)
    checks += _opinions(task, models)
    changed = {name: model for name, model in models.items() if model.changed}
    sampler = _sampler(task, models)
    known = _measured(task, models, changed, sampler)
    for export in task.exports:
        parts = {name: model.model for name, model in models.items()}
        reference = Reference(parts, known.floors, sampler, known.sampling)
        known.exports.append(expected_of(export, task.base.components, reference, task.progress))
    for name, model in changed.items():
        model.release()
        if sampler is not None:
            setattr(sampler.pipe, name, None)
    survival: list[AdapterSurvival] = []
    checks += _outputs(task, known, list(changed), sampler, survival)
    if all(c.passed for c in checks if c.name.endswith(LOADS)):
        checks += _exports(task, known, sampler, survival)
    advice = (*_without_inputs(task, known, changed), *_without_effect(task, known, changed))
    result = ValidationResult(tuple(checks), weight_errors=errors, advice=advice, adapter_survival=tuple(survival))
    if task.pictures is None or known.sampling is None:
        return result
    shown = {name: sample.picture for name, sample in known.samples.items()}
    return replace(result, pictures=save_pictures(task.pictures, shown, "unmerged"))


def _tensors(task: Task, models: Mapping[str, Unmerged]) -> tuple[tuple[str, ...], list[Check]]:
    """Of every component, changed or not, and of the files beside them."""
    errors: list[str] = []
    checks: list[Check] = []
    vectors = Vectors.of(task.adapters)
    for name, model in models.items():
        merged = stored_tensors(task.merged.components[name])
        model.merged_as(merged)
        before = stored_tensors(model.component, task.variant)
        how = vectors, task.options.rows, task.options.merge.dtype, task.seed
        faulty, found = tensor_checks(model.changes, _base_parameters(model), before, merged, name, *how)
        errors += faulty
        checks += found
    files = files_check(task.base, task.merged, tokenizers=any(a.vectors for a in task.adapters))
    return tuple(errors), [*checks, files, *([vectors.check()] if vectors.rows else [])]


def _opinions(task: Task, models: Mapping[str, Unmerged]) -> list[Check]:
    """On the names of each adapter."""
    parts = {name: model.model for name, model in models.items()}
    checks = [second_opinion(task.base, adapter, parts, task.seed) for adapter in task.adapters]
    if len(checks) == 1:
        return checks
    return [replace(check, name=f"{check.name}_{number}") for number, check in enumerate(checks, 1)]


def _base_parameters(model: Unmerged) -> dict[str, torch.Tensor]:
    """Parameters that no module owns, without what was added to them."""
    with model.without_adapters():
        return {n: model.model.get_parameter(n).data.clone() for n in model.changes.parameters}


def _sampler(task: Task, models: Mapping[str, Unmerged]) -> Sampler | None:
    """None for a component alone."""
    if task.base.class_name is None:
        return None
    parts = {name: model.model for name, model in models.items()}
    options = task.options
    return open_sampler(task.base, parts, options.steps, options.size, task.seed)


def _calls(models: Mapping[str, Unmerged], sampler: Sampler | None, seed: int) -> dict[str, list[Call]]:
    if sampler is None:
        made = {n: made_up_calls(m.component, m.model, seed) for n, m in models.items()}
        return {name: calls for name, calls in made.items() if calls}
    calls = sampler.calls()
    for name in ("unet", "transformer"):
        if name in calls:
            calls[name] = sampler.at_times(calls[name][0], models[name].model)
    return calls


def _measured(
    task: Task, models: Mapping[str, Unmerged], changed: Mapping[str, Unmerged], sampler: Sampler | None
) -> Known:
    task.progress.stage("validate: the unmerged models on the same inputs, and how far rounding moves them")
    calls = _calls(models, sampler, task.seed)
    known = Known({n: c for n, c in calls.items() if n in models})
    for name, given in known.calls.items():
        model = models[name]
        reference = answers(model.model, given)
        with model.without_adapters():
            known.base[name] = answers(model.model, given)
        drawn = []
        for seed in range(DRAWS if model.changed else 0):
            with model.rounded(seed):
                drawn.append(apart(reference, answers(model.model, given)))
        known.floors[name] = Floor(given, reference, [widest(drawn)] if drawn else [], ROUNDING)
    if sampler is None:
        return known
    task.progress.stage(f"validate: pictures of {sampler.size} pixels in {sampler.steps} steps")
    everything = list(changed.values())
    with all_without_adapters(everything):
        known.samples["base"] = sampler.sample()
    known.samples["unmerged"] = sampler.sample()
    moved = []
    for seed in range(DRAWS):
        with all_rounded(everything, seed):
            moved.append(sampler.sample())
    known.sampling = SampleFloor(known.samples["unmerged"], moved, ROUNDING)
    return known


def _outputs(
    task: Task,
    known: Known,
    changed: Sequence[str],
    sampler: Sampler | None,
    survival: list[AdapterSurvival],
) -> list[Check]:
    """The merged models, each on the inputs of the unmerged one, and then together."""
    task.progress.stage("validate: the merged models on the same inputs")
    checks, merged = [], {}
    for name in changed:
        try:
            merged[name] = load(task.merged.components[name])
        except CheckpointError as error:
            checks.append(Check(f"{name}{LOADS}", 1.0, 0.0, False, error.found))
            continue
        floor = known.floors.get(name)
        if floor is None:
            continue
        found = answers(merged[name], floor.calls)
        checks += floor.checks(name, found, task.options.tolerance)
        if name in DENOISERS:
            survival.append(AdapterSurvival("merged", kept(known.base[name], floor.reference, found), None, None))
    if sampler is None or known.sampling is None or len(merged) < len(changed):
        return checks
    for name, model in merged.items():
        setattr(sampler.pipe, name, model)
    known.samples["merged"] = sampler.sample()
    checks += known.sampling.checks(known.samples["merged"], task.options.tolerance)
    effect = rmse(known.samples["unmerged"].picture, known.samples["base"].picture)
    note = "dB, of the base's picture against the unmerged one: what the adapters change"
    return [*checks, reported("adapter_effect_psnr", min(psnr(effect), 1.7e308), note)]


def _exports(task: Task, known: Known, sampler: Sampler | None, survival: list[AdapterSurvival]) -> list[Check]:
    """sampler: with the merged models, whose places the graphs take."""
    checks: list[Check] = []
    merged, options = task.merged.components, task.options
    for export, expected in zip(task.exports, known.exports, strict=True):
        how = known.sampling, sampler, options.tolerance, options.provider, task.progress
        judged = judge_export(export, merged, expected, *how)
        checks += judged.checks
        name = f"onnx {export.precision}"
        if judged.sample is not None:
            known.samples[name] = judged.sample
        for part in (p for p in DENOISERS if p in judged.outputs):
            share = kept(known.base[part], known.floors[part].reference, judged.outputs[part])
            survival.append(AdapterSurvival(name, share, None, None))
            checks += _survival_check(export, share, options.least_survival)
    return checks


def _survival_check(export: ExportedPipeline, share: float | None, least: float) -> list[Check]:
    """What quantized numbers do is known, so that only this check says whether it is too much."""
    if share is None:
        return []
    note = f"share of the adapters' effect on the denoiser's outputs that {export.precision} keeps"
    passed = share >= least if least else math.isfinite(share)
    return [Check(f"{export.prefix}adapter_survival", share, least or None, passed, note)]


def _without_inputs(task: Task, known: Known, changed: Collection[str]) -> tuple[str, ...]:
    """A sentence where the outputs of a model alone were not compared."""
    unknown = [n for n in changed if n not in known.floors]
    if not unknown:
        return ()
    name = task.base.components[unknown[0]].class_name
    text = f"the {name} got no inputs here: its tensors were compared, and not its outputs"
    task.progress.warn(text)
    return (text,)


def _without_effect(task: Task, known: Known, changed: Collection[str]) -> tuple[str, ...]:
    """A sentence where the adapters change no output at all."""
    moved = [
        difference
        for name in changed
        if name in known.floors
        for each in apart(known.base[name], known.floors[name].reference)
        for difference in each.values()
    ]
    if largest(moved) != 0:
        return ()
    if not moved:
        return ()
    text = "the adapters change no output of any component on these inputs: the merged pipeline is the base"
    task.progress.warn(text)
    return (text,)
