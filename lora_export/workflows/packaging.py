"""A finished run becomes a package for one runtime."""

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_export import manifest, packages
from lora_export.allowed import check_model_folder, check_package
from lora_export.contracts import ExportOptions, ExportResult, PackageOptions, PackageResult, Progress
from lora_export.errors import InputError, OutputError
from lora_export.packages import archive, card, companions, contents, signature
from lora_export.packages.job import RUNS_OWN, PackageJob, PackageTarget, Run, Sample, Variant
from lora_export.packages.programs import NUMBERS, PROMPT
from lora_export.packages.targets import target_named
from lora_export.packages.tasks import task_of
from lora_export.storage import files, sealed
from lora_export.workflows.delivered import refuse_other_words
from lora_export.workflows.verifying import check_run

WORST_AGREEMENT = 0.8  # share of tokens on which a variant should say the same as the run's own export


def package(run: Path, target: str, output: Path, options: PackageOptions, progress: Progress) -> PackageResult:
    """Write a package of `run` for the runtime `target` into the new folder `output`, or into a file of that name.

    All or nothing. InputError for a run that failed, was changed since, or lacks what the runtime needs.
    """
    started = time.monotonic()
    chosen = target_named(target)
    found = read_run(run, progress)
    if chosen.needs_merged and found.merged is None:
        raise InputError(
            "the run has no merged folder (--no-merged-folder)",
            where=run,
            expected=f"merged/, from which a package for {target} is made",
            next_step="repeat merge-and-export without --no-merged-folder, or choose another --for",
        )
    companions.check(found)
    variants = chosen.variants(found, options.variants)
    name = _name(options.name, found)
    if options.key is not None:
        signature.check_key(options.key)
    final = archive.named(output, options.archive) if options.archive else output
    plugged, adapters = _plugged(options.pluggable, chosen, found)
    inputs = [run, *(p for p in (options.key, options.pluggable) if p)]
    with _stage(final, options, inputs) as stage:
        work = stage / ".work"
        work.mkdir()
        exports = {v.name: _export(v, found, work / v.name, progress) for v in variants}
        if plugged is not None:
            exports = {RUNS_OWN: plugged}
        measured, sample = _measured(found, exports, progress), _sample(found)
        job = PackageJob(found, stage, name, chosen.providers(found, options.provider), exports, sample, adapters)
        progress.stage(f"package: {name} for {target}")
        packages.lay(job, chosen)
        shutil.rmtree(work)
        licence = card.licence_of(found, options.licence)
        facts = packages.describe(job, chosen, licence)
        if adapters:
            refuse_other_words(stage, facts, progress)
        packages.seal(job, facts, licence, _kept(options), measured, options.key)
        check_package(stage, chosen.file_names)
        chosen.check_folder(stage)
        sizes = sealed.sizes(stage)
    return PackageResult(
        output=final,
        target=target,
        name=name,
        files=sizes,
        variants=tuple(exports),
        measured=measured,
        archive=options.archive,
        signed=options.key is not None,
        seconds=time.monotonic() - started,
    )


def _kept(options: PackageOptions) -> dict[str, Any]:
    """The options as a manifest keeps them: nothing that is different where it was made."""
    return {
        "variants": list(options.variants),
        "provider": options.provider,
        "licence": options.licence,
    }


@contextmanager
def _stage(final: Path, options: PackageOptions, inputs: list[Path]) -> Iterator[Path]:
    """The folder to fill; with an archive, what it holds becomes the file `final` at the end."""
    if options.archive is None:
        with files.output_folder(final, options.force, inputs=inputs) as stage:
            yield stage
        return
    with files.output_file(final, options.force, inputs=inputs) as work:
        stage = work / "contents"
        stage.mkdir()
        yield stage
        archive.write(stage, work / final.name, options.archive)
        shutil.rmtree(stage)


# --- the run -----------------------------------------------------------------------------------------------


def read_run(folder: Path, progress: Progress) -> Run:
    """A run that passed and is as it was left. InputError for any other folder."""
    from lora_export.onnx_export import check_export, load_export
    from lora_export.onnx_export.engines import engine_named
    from lora_export.report import load as load_report

    if not folder.is_dir() or contents.is_package(folder) or not manifest.is_run(folder):
        raise InputError(
            "this is no run",
            where=folder,
            expected="the folder that merge-and-export wrote, with manifest.json",
            next_step="lora-export merge-and-export -b BASE -a ADAPTER -o RUN",
        )
    progress.stage("package: every file of the run")
    checks, _ = check_run(folder, None, [])
    wrong = next((c for c in checks if not c.passed), None)
    if wrong is not None:
        raise InputError(
            f"the run is not as it was left: {wrong.note}",
            where=folder,
            expected="every file as its manifest says",
            next_step=f"lora-export verify {folder}, or repeat the run",
        )
    report = load_report(folder / "report")
    if report.status != "passed" or report.merge is None or report.validate is None:
        raise InputError(
            "the run did not pass its gates, and a package would carry that on",
            where=folder,
            expected="a run that passed",
            next_step="read report/report.html in it, and repeat the run",
        )
    export = load_export(folder / "onnx")
    merged = folder / "merged" if (folder / "merged").is_dir() else None
    kept = merged or export.output
    check_export(export.output, export.graphs)
    check_model_folder(kept)
    config = sealed.read_json(kept / "config.json")
    architecture = str((config.get("architectures") or [""])[0])
    task = task_of(export.task, architecture)
    return Run(
        folder=folder,
        merged=merged,
        export=export,
        fp16_int4=engine_named(export.engine).fp16_int4,
        companions=kept,
        config=config,
        manifest=manifest.read(folder),
        report=report,
        merge=report.merge,
        validation=report.validate,
        task=task,
    )


def _plugged(folder: Path | None, target: PackageTarget, run: Run) -> tuple[ExportResult | None, tuple[str, ...]]:
    """An export with slots, and the names of its adapters, that of the run first. InputError for any other."""
    from lora_export.onnx_export import check_export, load_export
    from lora_export.onnx_export.records import read_record

    if folder is None:
        return None, ()
    own = [Path(a.name).name for a in run.manifest.adapters]
    names = read_record(folder).pluggable or ()
    if not target.takes_adapters or len(own) != 1 or own[0] not in names:
        raise InputError(
            f"--pluggable for {target.name}, of an export with {', '.join(names) or 'no adapters'} beside it",
            where=folder,
            expected=f"--for genai, and an export with {', '.join(own)} beside it, the only adapter of the run",
            next_step="lora-export export -m BASE -a ADAPTER -o EXPORT",
        )
    export = load_export(folder)
    check_export(export.output, export.graphs)
    return export, (own[0], *(n for n in names if n != own[0]))


def _name(asked: str | None, run: Run) -> str:
    """The name that was asked for, or one made of the adapters' names. InputError for one that no file can have."""
    if asked is not None:
        if not contents.is_model_name(asked):
            raise InputError(f"--name {asked!r}", expected=contents.MODEL_NAME_WORDS)
        return asked
    names = "-".join(a.name.rpartition("/")[2] for a in run.manifest.adapters)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", names).strip("-._")[:100] or "model"


# --- variants ----------------------------------------------------------------------------------------------


def _export(variant: Variant, run: Run, output: Path, progress: Progress) -> ExportResult:
    """The run's own export where it is what is wanted, else one of the merged folder."""
    from lora_export.onnx_export import export

    made_for = run.manifest.recorded_options.provider
    if variant.name == RUNS_OWN or (variant.precision, variant.provider) == (run.export.precision, made_for):
        return run.export
    assert run.merged is not None
    progress.stage(f"export: {variant.name}")
    options = ExportOptions(variant.precision, variant.provider, run.export.engine)
    return export(run.merged, output, options, progress=progress)


def _measured(run: Run, exports: Mapping[str, ExportResult], progress: Progress) -> dict[str, Any]:
    """What each variant that is not the run's own export was found to do beside it."""
    from lora_export.onnx_export.graphs.agreement import agreements

    others = {n: e.paths[0] for n, e in exports.items() if e is not run.export and n != RUNS_OWN}
    if not others:
        return {}
    against = run.export.precision
    progress.stage(f"compare: {', '.join(others)} with the run's {against}")
    found = agreements(run.export.paths[0], others, run.companions, run.config)
    for name, result in found.items():
        same = result.get("top1_agreement", 1.0)
        if not same >= WORST_AGREEMENT:
            progress.warn(f"{name} chooses the same token as {against} at {same:.0%} of positions only")
    return {name: {"against": against, **result} for name, result in found.items()}


def _sample(run: Run) -> Sample | None:
    """What a runtime should say: the unmerged model's words for the first prompt of the validation, or numbers of
    the validated graph; None where that is not text."""
    from lora_export.onnx_export.graphs.agreement import first_numbers

    sample = next((s for s in run.validation.samples if s.prompt and s.unmerged), None)
    if run.task.input != "text":
        return None
    if run.task.generates:
        return Sample(sample.prompt, sample.unmerged) if sample else None
    numbers = first_numbers(run.export.paths[0], run.companions, PROMPT, NUMBERS)
    return Sample(PROMPT, None, tuple(numbers))


# --- the hub -----------------------------------------------------------------------------------------------


def push(folder: Path, repository: str, private: bool, progress: Progress) -> str:
    """Upload a package to the hub, made if it is not there; its address. OutputError for what the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    progress.stage(f"push: {repository}")
    try:
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Package by lora-export")
        return str(made)
    except OfflineModeIsEnabled:
        raise OutputError(
            "the package is written, but HF_HUB_OFFLINE is set, so nothing was pushed",
            where=folder,
            expected="a network",
            next_step=f"HF_HUB_OFFLINE=0 hf upload {repository} {folder}",
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise OutputError(
            f"the package is written, but the hub does not take it: {str(error).splitlines()[0]}",
            where=repository,
            expected="owner/name, and a token that may write there",
            next_step=f"hf auth login, then hf upload {repository} {folder}",
        ) from None
