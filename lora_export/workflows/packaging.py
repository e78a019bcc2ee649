"""Making a package for one runtime of a finished run, and pushing it to the Hub."""

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_export import manifest
from lora_export.allowed import check_model_folder, check_package
from lora_export.contracts import ExportOptions, ExportResult, PackageOptions, PackageResult, Progress
from lora_export.contracts.option import kept
from lora_export.errors import ExportError, InputError, OutputError
from lora_export.packages import archive, bom, code, companions, contents, readme, signature
from lora_export.packages.gguf import precision
from lora_export.packages.job import RUNS_OWN, PackageFacts, PackageJob, PackageTarget, Run, Sample, Variant
from lora_export.packages.pipelines import laying
from lora_export.packages.programs import NUMBERS, PROMPT
from lora_export.packages.targets import target_named, targets
from lora_export.packages.tasks import task_of
from lora_export.storage import files, sealed
from lora_export.workflows import gguf
from lora_export.workflows.delivered import refuse_other_answer
from lora_export.workflows.pipelines import packaging as pictures
from lora_export.workflows.verifying import check_run

WORST_AGREEMENT = 0.8  # least share of positions at which a variant should choose the token of the run's export


def package(run: Path, target: str, output: Path, options: PackageOptions, progress: Progress) -> PackageResult:
    """Write a package of `run` for the runtime `target` into the new folder `output`, or an archive of that name.

    All or nothing. InputError for a run that failed, was changed since, or lacks what the runtime needs.
    """
    started = time.monotonic()
    runtime = target_named(target)
    _refuse_options(runtime, options)
    read = read_run(run, progress)
    if runtime.needs_merged and read.merged is None:
        raise InputError(
            "the run has no merged folder (--no-merged-folder)",
            where=run,
            expected=f"merged/, from which a package for {target} is made",
            next_step="repeat merge-and-export without --no-merged-folder, or choose another --for",
        )
    if read.task.draws:
        pictures.check(read, runtime)
    else:
        companions.check(read)
    variants, types = runtime.variants(read, options.variants), runtime.types(read, options.variants)
    planned = gguf.plan(read, options, progress) if types else None
    name = _name(options.name, read)
    if options.key is not None:
        signature.check_key(options.key)
    plugged, adapters = _plugged(options.pluggable, runtime, read)
    final = archive.named(output, options.archive) if options.archive else output
    inputs = (options.key, options.pluggable, options.adapter)
    with _stage(final, options, [run, *(p for p in inputs if p)]) as stage:
        work = stage / ".work"
        work.mkdir()
        exports = {v.name: _export(v, read, work / v.name, progress) for v in variants}
        if plugged is not None:
            exports = {RUNS_OWN: plugged}
        facts = _facts(read, runtime, name, exports, types, adapters, options)
        measured = _measured(read, exports, progress)
        if planned is not None:
            measured = gguf.make(planned, read, facts, options, stage, work, progress)
        progress.stage(f"package: {name} for {target}")
        runtime.lay(PackageJob(read, stage, exports, facts, options, progress))
        code.write(stage, runtime.code(facts))
        if read.task.draws:
            pictures.lay_sample(stage, read, facts, progress)
        shutil.rmtree(work)
        if adapters:
            refuse_other_answer(stage, facts, progress)
        _complete(stage, read, facts, options, measured)
        sizes = sealed.sizes(stage)
    return PackageResult(
        output=final,
        target=target,
        name=name,
        files=sizes,
        variants=facts.variants,
        measured=measured,
        archive=options.archive,
        signed=options.key is not None,
        seconds=time.monotonic() - started,
    )


def _facts(
    run: Run,
    target: PackageTarget,
    name: str,
    exports: Mapping[str, ExportResult],
    types: tuple[str, ...],
    adapters: tuple[str, ...],
    options: PackageOptions,
) -> PackageFacts:
    precisions = [*(e.precision for e in exports.values()), *(precision(t, run.merge.dtype) for t in types)]
    return PackageFacts(
        target=target,
        name=name,
        task=run.task,
        precision=next(iter(precisions), run.merge.dtype),
        variants=tuple(exports) or types,
        providers=target.providers(run, options.provider),
        sample=pictures.sample(run) if run.task.draws else _sample(run),
        config=run.config,
        adapters=adapters,
        weights=laying.weights_of(run.manifest.files),
        backend=options.backend or "",
        lora=options.adapter is not None,
    )


def _refuse_options(target: PackageTarget, options: PackageOptions) -> None:
    """InputError for an option of another runtime."""
    known = targets().values()
    for field in dict.fromkeys(f for t in known for f in t.own_options):
        if getattr(options, field) is not None and field not in target.own_options:
            takers = [t.name for t in known if field in t.own_options]
            raise InputError(f"--{field} with --for {target.name}", expected=f"--for {' or '.join(takers)} with it")


def _complete(
    stage: Path, run: Run, facts: PackageFacts, options: PackageOptions, measured: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write what every package has, beside what its runtime reads: licences, README, bill of materials, the
    manifest, which names every other file, and with a private key the signature, which covers them all."""
    for path in companions.licences(run):
        sealed.copy(path, stage / path.name)
    licence = readme.licence_of(run, options.licence)
    (stage / readme.NAME).write_text(readme.write(run, facts, licence), encoding="utf-8")
    hashes = sealed.hash_folder(stage)
    bom.write(stage, run, facts, licence, hashes)
    hashes[bom.NAME] = sealed.hashed(stage / bom.NAME)
    contents.write(stage, run, facts, kept(options), measured, hashes)
    if options.key is not None:
        signature.sign(stage, options.key)
    check_package(stage, code.names(facts))
    facts.target.check_folder(stage)


@contextmanager
def _stage(final: Path, options: PackageOptions, inputs: list[Path]) -> Iterator[Path]:
    """The folder to fill; with --archive, it is packed into the file `final` at the end."""
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
    """A run that passed its gates and is unchanged. InputError for any other folder."""
    from lora_export.onnx_export import check_export, load_export
    from lora_export.onnx_export.engines import engine_named
    from lora_export.report import load as load_report

    if not folder.is_dir() or contents.is_package(folder) or not manifest.is_run(folder):
        raise InputError(
            "not a run",
            where=folder,
            expected="the folder that merge-and-export wrote, with manifest.json",
            next_step="lora-export merge-and-export -b BASE -a ADAPTER -o RUN",
        )
    progress.stage("package: checking every file of the run")
    checks, _ = check_run(folder, None, [])
    wrong = next((c for c in checks if not c.passed), None)
    if wrong is not None:
        raise InputError(
            f"the run was changed: {wrong.note}",
            where=folder,
            expected="every file as in its manifest",
            next_step=f"lora-export verify {folder}, or repeat the run",
        )
    report = load_report(folder / "report")
    if report.status != "passed" or report.merge is None or report.validate is None:
        raise InputError(
            "the run did not pass its gates, so it cannot be packaged",
            where=folder,
            expected="a run that passed",
            next_step="read its report/report.html, and repeat the run",
        )
    export = load_export(folder / "onnx")
    merged = folder / "merged" if (folder / "merged").is_dir() else None
    kept = merged or export.output
    if export.kind in ("pipeline", "component"):
        config = pictures.index_of(export, kept)
    else:
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
    """An export with slots, and the names of its adapters, the run's own first. InputError for any other export."""
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


def _name(given: str | None, run: Run) -> str:
    """The given name, or one made of the adapters' names. InputError for one that is not a file name everywhere."""
    if given is not None:
        if not contents.is_model_name(given):
            raise InputError(f"--name {given!r}", expected=contents.MODEL_NAME_WORDS)
        return given
    names = "-".join(a.name.rpartition("/")[2].removesuffix(".safetensors") for a in run.manifest.adapters)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", names).strip("-._")[:100] or "model"


# --- variants ----------------------------------------------------------------------------------------------


def _export(variant: Variant, run: Run, output: Path, progress: Progress) -> ExportResult:
    """The run's own export if it is the variant, otherwise a new one of the merged folder."""
    from lora_export.onnx_export import export
    from lora_export.workflows.proving import prover

    asked = run.manifest.recorded_options
    if variant.name == RUNS_OWN or (variant.precision, variant.provider) == (run.export.precision, asked.provider):
        return run.export
    assert run.merged is not None
    progress.stage(f"export: {variant.name}")
    # The run's engine comes first of all, unless another was asked for; it may be wrong in this precision alone.
    options = ExportOptions(variant.precision, variant.provider, asked.engine)
    return export(run.merged, output, options, prove=prover(options.proof), progress=progress)


def _measured(run: Run, exports: Mapping[str, ExportResult], progress: Progress) -> dict[str, Any]:
    """How each variant that is not the run's own export compares with it."""
    from lora_export.onnx_export.graphs.agreement import agreements

    others = {n: e.paths[0] for n, e in exports.items() if e is not run.export and n != RUNS_OWN}
    if not others:
        return {}
    against = run.export.precision
    progress.stage(f"compare: {', '.join(others)} with the run's {against}")
    results = agreements(run.export.paths[0], others, run.companions, run.config)
    for name, result in results.items():
        same = result.get("top1_agreement", 1.0)
        if not same >= WORST_AGREEMENT:
            progress.warn(f"{name} chooses the same token as {against} at only {same:.0%} of positions")
    return {name: {"against": against, **result} for name, result in results.items()}


def _sample(run: Run) -> Sample | None:
    """The answer that a runtime should give: the unmerged model's text for the first prompt of the validation, or
    numbers of the validated graph; None for a model that does not read text."""
    from lora_export.onnx_export.graphs.agreement import first_numbers

    sample = next((s for s in run.validation.samples if s.prompt and s.unmerged), None)
    if run.task.input != "text":
        return None
    if run.task.generates:
        return Sample(sample.prompt, sample.unmerged) if sample else None
    _refuse_pages(run)
    numbers = first_numbers(run.export.paths[0], run.companions, PROMPT, NUMBERS)
    return Sample(PROMPT, None, tuple(numbers))


def _refuse_pages(run: Run) -> None:
    """Words with places on a page come from software that reads pictures, which no package has."""
    from lora_export.graph_runs.signature import BOXES, Signature
    from lora_export.onnx_export.graphs.checks import open_model

    graph = run.export.paths[0]
    if BOXES in Signature.of_model(open_model(graph), graph).inputs:
        raise ExportError(
            f"the graph reads {BOXES}, the places of words on a page, which no program of a package can make",
            where=graph,
            next_step="use the exported folder as it is, with the model's own processor",
        )


# --- the Hub -----------------------------------------------------------------------------------------------


def push(folder: Path, repository: str, private: bool, progress: Progress) -> str:
    """Upload a package to the Hub, into a new repository if needed; its address. OutputError if the Hub refuses."""
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
            f"the package is written, but the Hub refused it: {str(error).splitlines()[0]}",
            where=repository,
            expected="owner/name, and a token with write access",
            next_step=f"hf auth login, then hf upload {repository} {folder}",
        ) from None
