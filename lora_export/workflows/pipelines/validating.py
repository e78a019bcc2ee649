"""A merged pipeline and its ONNX exports against the unmerged pipeline, as an earlier run left them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lora_export.allowed import check_model_folder
from lora_export.checkpoint.pipeline import is_pipeline, open_pipeline
from lora_export.contracts import (
    AdapterChoice,
    DiffusionAdapter,
    ExportedPipeline,
    MergeOptions,
    Progress,
    ValidationOptions,
    ValidationResult,
)
from lora_export.contracts.option import names
from lora_export.errors import InputError
from lora_export.merging import CERTIFICATE
from lora_export.merging.certificate.document import read_certificate
from lora_export.merging.pipelines.document import is_merged_pipeline, read_pipeline_certificate
from lora_export.merging.pipelines.planning import PipelinePlan, plan_pipeline
from lora_export.storage.sealed import refuse_special
from lora_export.workflows.validating import only_certified

ADDED = frozenset({"lora", "lora_tucker", "loha", "lokr", "full"})


def validate_pipeline_folder(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    onnx: Sequence[Path],
    options: ValidationOptions,
    progress: Progress,
    beside: Sequence[Path] = (),
    pictures: Path | None = None,
) -> ValidationResult:
    """Validate a merged pipeline, or a merged model of diffusers alone, and exports of it.

    beside: exports of the base, and texts of the adapters, which pipelines have no use for; pictures: as in
    `validate_pipeline`.
    """
    from lora_export.validation.pipelines import validate_pipeline

    for folder in (base, merged, *onnx):
        refuse_special(folder)
    refuse_text_options(options, beside)
    if not is_pipeline(merged):
        raise InputError(
            "the base is a pipeline of diffusers, and this is none",
            where=merged,
            expected="a folder with model_index.json, or with the config.json of a diffusers model",
        )
    opened = open_pipeline(base), open_pipeline(merged)
    for component in opened[1].components.values():
        check_model_folder(component.folder)
    merge = merged_as(merged, options)
    understood = understood_adapters(base, adapters, merge)
    result = validate_pipeline(
        opened[0], understood, opened[1], exports=exported(onnx), pictures=pictures,
        options=replace(options, merge=merge), progress=progress,
    )  # fmt: skip
    return replace(result, merge_options=only_certified(merge, options.merge))


def exported(folders: Sequence[Path]) -> tuple[ExportedPipeline, ...]:
    """Exports of a pipeline, checked, with names for their checks. InputError for two in one precision."""
    from lora_export.onnx_export import check_export, load_export

    made: list[ExportedPipeline] = []
    for folder in folders:
        found = load_export(folder)
        check_export(found.output, found.graphs)
        if any(e.precision == found.precision for e in made):
            raise InputError(
                f"two of the exports are in {found.precision}",
                where=folder,
                expected="one --onnx for each precision, which names their checks",
                next_step="validate them one at a time",
            )
        prefix = "onnx_" if not made else f"onnx_{found.precision}_"
        made.append(ExportedPipeline(found.output, found.precision, prefix))
    return tuple(made)


def refuse_text_options(options: ValidationOptions, beside: Sequence[Path] = ()) -> None:
    """InputError for options that are about language models."""
    given = {
        "--base-onnx, --own-text": bool(beside),
        "--prompts": options.prompts is not None,
        "--text": options.text is not None,
        "--compare-bases": options.bases is not None,
    }
    refuse_given(given, "--steps, --size, --tolerance, --min-survival and options of the merge")


def refuse_given(given: Mapping[str, bool], expected: str) -> None:
    """InputError for the first option that was given although pipelines have no use for it."""
    for flag, asked in given.items():
        if asked:
            raise InputError(
                f"{flag} with a pipeline of images",
                expected=expected,
                next_step=f"the same command without {flag}",
            )


def understood_adapters(
    base: Path, adapters: Sequence[AdapterChoice], merge: MergeOptions
) -> tuple[DiffusionAdapter, ...]:
    """As `adapters_beside`, of a plan made anew."""
    return adapters_beside(plan_pipeline(base, adapters, merge))


def adapters_beside(planned: PipelinePlan) -> tuple[DiffusionAdapter, ...]:
    """Whose tensors are which module's, with the weights of the command. InputError for a combination that no
    unmerged forward shows."""
    base, merge = planned.pipeline.folder, planned.options
    kinds = {kind for adapter in planned.adapters for kind in adapter.kinds}
    if merge.combine not in ("none", "linear", "cat") or (merge.combine != "none" and merge.combine_on != "deltas"):
        raise InputError(
            f"adapters that were combined by {merge.combine} have no unmerged forward in a pipeline",
            where=base,
            expected="adapters that are added, or --combine linear",
            next_step="lora-export verify, which computes the combination again",
        )
    if merge.combine != "none" and not kinds <= ADDED:
        raise InputError(
            f"{', '.join(sorted(kinds - ADDED))} cannot be added up by an unmerged forward",
            where=base,
            expected=f"--combine {merge.combine} of {', '.join(sorted(ADDED))}",
            next_step="lora-export verify, which computes the combination again",
        )
    return tuple(replace(a, weight=c.weight) for a, c in zip(planned.adapters, planned.choices, strict=True))


def merged_as(merged: Path, options: ValidationOptions) -> MergeOptions:
    """The options of the merge: its certificate's, or without one those that were given. InputError where one that
    was stated contradicts the certificate."""
    given, default = options.merge, MergeOptions()
    if is_merged_pipeline(merged):
        recorded = read_pipeline_certificate(merged).options
    elif (merged / CERTIFICATE).is_file():
        recorded = read_certificate(merged).options
    else:
        return given
    free = names(MergeOptions, lambda how: not how.changes_result)
    for name in asdict(default):
        stated = (
            name in options.stated if options.stated is not None else getattr(given, name) != getattr(default, name)
        )
        if name not in free and stated and getattr(given, name) != getattr(recorded, name):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} {getattr(given, name)}, but the folder was merged with {getattr(recorded, name)}",
                where=merged / CERTIFICATE,
                expected="the options of the merge, which its certificate has, or none",
                next_step=f"the same command without {flag}",
            )
    return replace(recorded, **{name: getattr(given, name) for name in free})
