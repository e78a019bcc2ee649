"""A merged folder checked again later, with its certificate as a claim to be proved, not as evidence.

What the certificate says is computed again: from the folder's own bytes, and, where base and adapters are given,
from a new plan, a merge of which every byte is compared, and the files that a merge would write. Then the two must
agree, field by field.
"""

import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.checkpoint import open_checkpoint
from lora_export.checkpoint.adapter_files import adapter_tensors
from lora_export.checkpoint.companions import companion_files
from lora_export.contracts import (
    AdapterChoice,
    Findings,
    MergeOptions,
    Progress,
    TensorInfo,
    Verification,
    VerifyOptions,
)
from lora_export.contracts.option import names
from lora_export.errors import InputError, LoraExportError
from lora_export.merging.certificate.as_recorded import (
    adapter_files,
    files,
    hashes,
    output_tensors,
    place,
    unlike,
    what_is_missing,
    words,
)
from lora_export.merging.certificate.compare import compare
from lora_export.merging.certificate.document import (
    NAME,
    Certificate,
    FileRecord,
    certificate_of,
    describe_files,
    describe_shards,
    read_certificate,
)
from lora_export.merging.certificate.recheck import Recheck
from lora_export.merging.certificate.recompute import recompute
from lora_export.merging.planning.base_checks import base_checks
from lora_export.merging.planning.plan import MergePlan
from lora_export.merging.running.audit import Auditor
from lora_export.merging.running.companions import write_beside

Replan = Callable[[MergeOptions], MergePlan]


def verify_folder(
    folder: Path,
    base: Path | None,
    adapters: Sequence[AdapterChoice],
    how: VerifyOptions,
    progress: Progress,
    replan: Replan | None = None,
) -> Verification:
    """Check a merged folder. InputError if it has no certificate, or if `base` or an adapter is something else.

    Without base and adapters only hashes can be checked, and `not_checked` says so. replan: the plan of the merge
    with the options of the certificate; None: that of `base` and `adapters`.
    """
    if not (folder / NAME).is_file():
        raise InputError(
            f"there is no {NAME} here",
            where=folder,
            expected="a folder that lora-export merge wrote, or the folder of a whole run",
            next_step="give the folder that was named with -o",
        )
    if base is not None:
        open_checkpoint(base)
    for choice in adapters:
        adapter_tensors(choice.folder)
    findings, recorded = certificate(folder)
    if recorded is None:
        return findings.result()
    files(findings, folder, recorded)
    adapter_files(findings, recorded, adapters)
    written, odd = output_tensors(folder, recorded)
    known: Mapping[str, str] = {}
    if base is not None and len(adapters) == len(recorded.adapters):
        planned = planned_again(findings, recorded, base, adapters, replan)
        known = _again(findings, folder, recorded, planned, written, how, progress) if planned else {}
    else:
        what_is_missing(findings, recorded, base, adapters)
    hashes(findings, recorded, written, odd, known)
    return findings.result()


def certificate(folder: Path) -> tuple[Findings, Certificate | None]:
    """The certificate in a folder, if it is whole, and what was found out about it."""
    findings = Findings()
    try:
        recorded = read_certificate(folder)
    except InputError as error:
        findings.fail("certificate", words(error))
        findings.not_checked.append("everything else: the certificate was changed, so nothing it says is known")
        return findings, None
    findings.judge("certificate", "complete, and agrees with its own digest", ())
    return findings, recorded


def planned_again(
    findings: Findings,
    recorded: Certificate,
    base: Path,
    adapters: Sequence[AdapterChoice],
    replan: Replan | None = None,
) -> MergePlan | None:
    """The plan of the merge that the certificate is about; None where base and adapters make no such model."""
    from lora_export.merging import plan, prepare

    options = replace(recorded.options, device="cpu")
    _name_options(findings, options)
    try:
        planned = replan(options) if replan else plan(base, adapters, options)
    except LoraExportError as error:
        findings.fail("plan", f"base and adapters do not make this model: {words(error)}")
        return None
    if planned.computes:
        prepare("cpu")
    return planned


def _name_options(findings: Findings, options: MergeOptions) -> None:
    """A certificate's author chooses the options in it, so those that differ from the defaults are named."""
    default, same = MergeOptions(), names(MergeOptions, lambda how: not how.changes_result)
    kept = {k: v for k, v in vars(options).items() if v != getattr(default, k) and k not in same}
    if kept:
        claimed = ", ".join(f"{k} {v}" for k, v in kept.items())
        findings.not_checked.append(
            f"whether {claimed} was asked for: these options of the merge are the certificate's"
        )


# --- from base and adapters --------------------------------------------------------------------------------


def _again(
    findings: Findings,
    folder: Path,
    recorded: Certificate,
    planned: MergePlan,
    outputs: Mapping[str, TensorInfo],
    how: VerifyOptions,
    progress: Progress,
) -> Mapping[str, str]:
    """Everything computed anew and compared; the hashes of tensors whose bytes are those that were computed."""
    shards = describe_shards(planned)
    findings.judge(
        "plan", f"{len(planned.tensors)} tensors have the planned shape and type", _unplanned(planned, outputs)
    )
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        again = Path(scratch)
        write_beside(planned, companion_files(planned.base.folder), again)
        beside = describe_files(again, shards)
    wanted = dict(sorted({**beside, **shards}.items()))
    failures = [f"{name} is not what the merge writes" for name, f in wanted.items() if not _is(folder / name, f)]
    failures += [f"{n} is not a file that the merge writes" for n in sorted(recorded.files.keys() - wanted.keys())]
    findings.judge("written_files", f"{len(wanted)} files are what a merge writes, headers byte for byte", failures)
    if not all(_is(folder / name, f) for name, f in shards.items()):
        findings.not_checked.append(
            "arithmetic and figures: files of tensors are missing, or are laid out otherwise"
        )
        return {}
    try:
        audit, known = _computed(findings, planned, folder, recorded, outputs, how, progress)
    except LoraExportError as error:
        findings.fail("arithmetic", f"the merge cannot be done again: {words(error)}")
        return {}
    findings.not_checked += [f"the arithmetic of {n}: {why}" for n, why in audit.unchecked.items()]
    compare(findings, recorded, certificate_of(audit, base_checks(planned), wanted))
    return known


def _computed(
    findings: Findings,
    planned: MergePlan,
    folder: Path,
    recorded: Certificate,
    outputs: Mapping[str, TensorInfo],
    how: VerifyOptions,
    progress: Progress,
) -> tuple[Auditor, Mapping[str, str]]:
    """What a fresh merge says of every tensor, and the hashes of those that agree with it byte for byte."""
    if how.certify == "full":
        progress.stage(f"verify: all of the merge again, {planned.nbytes / 1e6:.0f} MB")
        return recompute(findings, planned, folder, recorded, progress)
    seed = secrets.randbelow(2**32) if how.seed is None else how.seed
    what = f"{how.rows} rows of every computed tensor, drawn with --seed {seed}"
    progress.stage(f"verify: {what}")
    recheck = Recheck(planned, outputs, how.rows, seed, progress)
    recheck.run()
    findings.judge("arithmetic", f"{what}, are what float64 gives", recheck.beyond)
    findings.not_checked.append(f"all other rows of the computed tensors: {what}, as --certify sampled asked for")
    return recheck.audit, {}


def _is(path: Path, wanted: FileRecord) -> bool:
    return path.is_file() and not unlike(path, path.name, wanted)


def _unplanned(planned: MergePlan, outputs: Mapping[str, TensorInfo]) -> Iterator[str]:
    homes = {t.name: s.file for s in planned.shards for t in s.tensors}
    for name, tensor in planned.tensors.items():
        written = outputs.get(name)
        if written is None:
            yield f"{name}: planned, and not there"
        elif (written.dtype, written.shape, written.file.name) != (
            tensor.output.dtype,
            tensor.output.shape,
            homes[name],
        ):
            yield (
                f"{place(written)}: {written.dtype} {list(written.shape)}, planned is {tensor.output.dtype} "
                f"{list(tensor.output.shape)} in {homes[name]}"
            )
    for name in outputs.keys() - planned.tensors.keys():
        yield f"{place(outputs[name])}: not planned"
