"""A merged pipeline checked again: its certificate, what was copied, and each merged component as a model alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from lora_export.checkpoint.pipeline import INDEX
from lora_export.contracts import AdapterChoice, Findings, MergeOptions, Progress, Verification, VerifyOptions
from lora_export.errors import InputError, LoraExportError
from lora_export.merging.certificate.as_recorded import words
from lora_export.merging.certificate.document import NAME
from lora_export.merging.certificate.verify import Replan, verify_folder
from lora_export.merging.pipelines.document import (
    CopiedFile,
    PipelineCertificate,
    blake3_of,
    copied_files,
    pipeline_certificate,
    read_pipeline_certificate,
)
from lora_export.merging.pipelines.merging import to_copy
from lora_export.merging.pipelines.planning import PipelinePlan, plan_pipeline
from lora_export.merging.planning.plan import MergePlan
from lora_export.storage.sealed import refuse_outward_link, sha256


def verify_pipeline(
    folder: Path, base: Path | None, adapters: Sequence[AdapterChoice], how: VerifyOptions, progress: Progress
) -> Verification:
    """Check a merged pipeline, or a model of diffusers alone, as `verify_folder` checks a model.

    Without base and adapters only hashes can be checked, and `not_checked` says so.
    """
    if not (folder / INDEX).is_file():
        return verify_folder(folder, base, adapters, how, progress, _alone(base, adapters))
    if not (folder / NAME).is_file():
        raise InputError(
            f"there is no {NAME} here",
            where=folder,
            expected="a pipeline that lora-export merge wrote",
            next_step="give the folder that was named with -o",
        )
    if base is not None and not (base / INDEX).is_file():
        raise InputError("the base is no pipeline", where=base, expected=f"a folder with {INDEX}")
    findings = Findings()
    try:
        recorded = read_pipeline_certificate(folder)
    except InputError as error:
        findings.fail("certificate", words(error))
        findings.not_checked.append("everything else: the certificate was changed, so nothing it says is known")
        return findings.result()
    findings.judge("certificate", "complete, and agrees with its own digest", ())
    for path in folder.rglob("*"):
        if path.is_symlink():
            refuse_outward_link(path, folder)
    there = copied_files(folder, recorded.components)
    findings.judge("files", f"{len(recorded.files)} copied files are as recorded", _files(folder, recorded, there))
    planned = None
    if base is not None and len(adapters) == len(recorded.adapters):
        planned = _planned(findings, recorded, base, adapters)
    if planned is not None:
        _as_planned(findings, folder, recorded, planned, there)
    results = [findings.result()]
    for name in recorded.components:
        if (folder / name / NAME).is_file():
            results.append(_component(folder, name, base, planned, how, progress))
    return Verification(
        tuple(c for r in results for c in r.checks), tuple(dict.fromkeys(n for r in results for n in r.not_checked))
    )


def _alone(base: Path | None, adapters: Sequence[AdapterChoice]) -> Replan | None:
    """How a merge into a model of diffusers alone is planned again."""
    if base is None:
        return None

    def replan(options: MergeOptions) -> MergePlan:
        (plan,) = plan_pipeline(base, adapters, options).components.values()
        return plan

    return replan


def _planned(
    findings: Findings, recorded: PipelineCertificate, base: Path, adapters: Sequence[AdapterChoice]
) -> PipelinePlan | None:
    try:
        return plan_pipeline(base, adapters, replace(recorded.options, device="cpu"))
    except LoraExportError as error:
        findings.fail("plan", f"base and adapters do not make this pipeline: {words(error)}")
        return None


def _files(folder: Path, recorded: PipelineCertificate, there: Mapping[str, CopiedFile]) -> Iterator[str]:
    """How the files of a folder differ from the certificate's."""
    for name in sorted(there.keys() | recorded.files.keys()):
        if name not in there:
            yield f"{name} is missing"
        elif name not in recorded.files:
            yield f"{name} was added after the merge"
        elif there[name] != recorded.files[name]:
            yield f"{name} was changed: its BLAKE3 differs"
    for name, component in recorded.components.items():
        path = folder / name / NAME
        if not path.is_file():
            yield f"{name}/{NAME} is missing"
        elif sha256(path) != component.certificate_sha256:
            yield f"{name}/{NAME} is not the one that was written"


def _as_planned(
    findings: Findings,
    folder: Path,
    recorded: PipelineCertificate,
    planned: PipelinePlan,
    there: Mapping[str, CopiedFile],
) -> None:
    """The certificate against one made anew of base and adapters, and what was copied against the base."""
    root = planned.pipeline.folder
    files = {p.relative_to(root).as_posix(): blake3_of(p) for p in to_copy(planned)[0]}
    extended = planned.tokens.files(planned.components)
    files |= {name: blake3(raw).hexdigest() for name, raw in extended.items()}
    failures = [f"{n} is not copied by a merge" for n in sorted(recorded.files.keys() - files.keys())]
    failures += [f"{n} is not there" for n in sorted(files.keys() - recorded.files.keys())]
    failures += [
        f"{n} is not the base's" + (" with the adapters' tokens" if n in extended else "")
        for n, digest in files.items()
        if n in recorded.files and digest != recorded.files[n].blake3
    ]
    as_base = f"{len(files) - len(extended)} files are the base's, byte for byte"
    more = f"; {len(extended)} have the adapters' tokens besides" if extended else ""
    findings.judge("copied_files", as_base + more, failures)
    try:
        made = pipeline_certificate(folder, planned, there)
    except LoraExportError as error:
        findings.fail("pipeline", words(error))
        return
    # The plan follows from the recorded options; it is carried out on the CPU, on whatever device it was before.
    claimed, again = recorded.as_json(), replace(made, options=recorded.options).as_json()
    odd = [n for n in claimed if n != "tool" and claimed[n] != again.get(n)]
    findings.judge(
        "pipeline", "base and adapters make this certificate again", [f"{n} is not what they make" for n in odd]
    )


def _component(
    folder: Path,
    name: str,
    base: Path | None,
    planned: PipelinePlan | None,
    how: VerifyOptions,
    progress: Progress,
) -> Verification:
    """A merged component, with its name before each finding."""
    own = planned.components.get(name) if planned else None
    if planned is None or own is None:
        found = verify_folder(folder / name, base / name if base else None, (), how, progress)
    else:
        of_base, choices = planned.checkpoints[name].folder, planned.merged_into[name]
        found = verify_folder(folder / name, of_base, choices, how, progress, lambda _: own)
    checks = tuple(replace(c, name=f"{name}: {c.name}") for c in found.checks)
    return Verification(checks, found.not_checked)
