"""A merged folder checked again later, with its certificate as something to be proved and not as a witness.

What the certificate says is computed again: from the folder's own bytes, and, where base and adapters are given,
from a new plan, float64 rows and the files that a merge would write. Then the two must agree, field by field.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lora_export.checkpoint import open_adapter_files, open_checkpoint
from lora_export.checkpoint.companions import companion_files
from lora_export.checkpoint.hashing import hash_tensor
from lora_export.checkpoint.header import read_header
from lora_export.choices import Certify
from lora_export.contracts import AdapterChoice, Progress, TensorInfo, Verification
from lora_export.errors import CheckpointError, InputError, LoraExportError
from lora_export.merging.beside import write_beside
from lora_export.merging.certificate import (
    NAME,
    Files,
    adapter_hashes,
    certificate_of,
    describe_files,
    describe_shards,
)
from lora_export.merging.certificate_check import Findings, _options, compare, read_certificate
from lora_export.merging.plan import MergePlan
from lora_export.merging.recheck import Recheck, place
from lora_export.merging.right_base import base_checks
from lora_export.sealed import plain_name, refuse_outward_link, sha256


def verify_folder(
    folder: Path, base: Path | None, adapters: Sequence[AdapterChoice], certify: Certify, progress: Progress
) -> Verification:
    """Check a merged folder. InputError where there is no certificate, or what was given is no base or adapter.

    Without base and adapters only hashes can be checked, and `not_checked` says so.
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
        open_adapter_files(choice.folder)
    findings = Findings()
    try:
        recorded = read_certificate(folder)
    except InputError as error:
        findings.fail("certificate", _words(error))
        findings.not_checked.append("everything else: the certificate was changed, so nothing it says is known")
        return findings.result()
    findings.judge("certificate", "complete, and agrees with its own digest", ())
    _files(findings, folder, recorded)
    outputs = _output_tensors(findings, folder, recorded)
    _adapter_files(findings, recorded, adapters)
    if base is not None and len(adapters) == len(recorded["adapters"]):
        _again(findings, folder, recorded, base, adapters, outputs, certify, progress)
    else:
        _what_is_missing(findings, recorded, base, adapters)
    return findings.result()


def verify_streamed(folder: Path, hashes: Mapping[str, str]) -> Verification:
    """Check the certificate of a merge that went straight into an export.

    hashes: of the tensors that the export says it was made of, by name. What the export's own files hold is not
    looked at.
    """
    findings = Findings()
    try:
        recorded = read_certificate(folder)
    except InputError as error:
        findings.fail("certificate", _words(error))
        return findings.result()
    findings.judge("certificate", "complete, and agrees with its own digest", ())
    wanted = {r["name"]: r["hash_out"] for r in recorded["records"]}
    other = [n for n in wanted.keys() | hashes.keys() if wanted.get(n) != hashes.get(n)]
    notes = [
        f"{name}: the export was made of other numbers than the certificate is about" for name in sorted(other)
    ]
    findings.judge("tensors", f"the export was made of the certificate's {len(wanted)} tensors", notes)
    findings.not_checked.append(
        "the merged numbers against base and adapters: without a merged folder they lie in the export alone; "
        "lora-export merge with the same options has the hashes of this certificate"
    )
    return findings.result()


# --- the folder alone --------------------------------------------------------------------------------------


def _files(findings: Findings, folder: Path, recorded: Mapping[str, Any]) -> None:
    paths = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    present = {p.relative_to(folder).as_posix() for p in paths} - {NAME}
    wanted: Files = recorded["files"]
    failures = [f"{n} is missing" for n in sorted(wanted.keys() - present)]
    failures += [f"{n} was added after the merge" for n in sorted(present - wanted.keys())]
    for name in sorted(present & wanted.keys()):
        refuse_outward_link(folder / name)
        failures += _file(folder / name, name, wanted[name])
    findings.judge("files", f"{len(wanted)} files are there, as large as they were, their hashes agree", failures)


def _file(path: Path, name: str, wanted: Mapping[str, Any]) -> list[str]:
    size = path.stat().st_size
    if size != wanted["size"]:
        return [f"{name} has {size} bytes, the certificate says {wanted['size']}"]
    if "sha256" in wanted:
        return [] if sha256(path) == wanted["sha256"] else [f"{name} was changed: its SHA-256 is another"]
    found = hashlib.sha256(_header_bytes(path)).hexdigest()
    return [] if found == wanted["header_sha256"] else [f"the header of {name} was changed: its SHA-256 is another"]


def _header_bytes(path: Path) -> bytes:
    """Length and header of a safetensors file; of a damaged one, what is there of them."""
    with path.open("rb") as f:
        prefix = f.read(8)
        return prefix + f.read(min(int.from_bytes(prefix, "little"), path.stat().st_size))


def _output_tensors(findings: Findings, folder: Path, recorded: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of the folder by name, each compared with the certificate's shape, type and hash."""
    found: dict[str, TensorInfo] = {}
    failures: list[str] = []
    for name in sorted(n for n, f in recorded["files"].items() if "header_sha256" in f and plain_name(n)):
        try:
            if (folder / name).is_file():
                found |= read_header(folder / name).tensors
        except CheckpointError as error:
            failures.append(_words(error))
    records = {r["name"]: r for r in recorded["records"]}
    failures += [f"{n} is not there" for n in sorted(records.keys() - found.keys())]
    failures += [f"{place(found[n])} has no record" for n in sorted(found.keys() - records.keys())]
    both = [found[n] for n in found.keys() & records.keys()]
    for info in sorted(both, key=lambda t: t.name):
        wanted = records[info.name]
        if (info.dtype, list(info.shape)) != (wanted["dtype"], wanted["shape"]):
            failures.append(f"{place(info)} is {info.dtype} {list(info.shape)}, not as recorded")
    with ThreadPoolExecutor(2) as pool:
        for info, digest in zip(both, pool.map(hash_tensor, both), strict=True):
            if digest != records[info.name]["hash_out"]:
                failures.append(f"{place(info)}: its hash is not the recorded one")
    findings.judge("output_hashes", f"the bytes of {len(found)} tensors are those that were written", failures)
    return found


def _adapter_files(findings: Findings, recorded: Mapping[str, Any], adapters: Sequence[AdapterChoice]) -> None:
    if not adapters:
        return
    wanted, failures = recorded["adapters"], []
    if len(wanted) != len(adapters):
        failures.append(f"{len(adapters)} adapters were given, the certificate names {len(wanted)}")
    for choice, entry in zip(adapters, wanted, strict=False):
        tensors = open_adapter_files(choice.folder)[1].tensors
        found = adapter_hashes(choice.folder, {t.file for t in tensors.values()})
        for name in sorted(found.keys() | entry["sha256"].keys()):
            if found.get(name) != entry["sha256"].get(name):
                failures.append(f"{choice.folder / name} is not the file that was merged")
        if choice.weight != entry["weight"]:
            failures.append(f"the weight is {choice.weight:g}, merged was {entry['weight']:g}: give -a DIR:WEIGHT")
    findings.judge("adapter_hashes", f"{len(adapters)} adapters are those that were merged", failures)


def _what_is_missing(
    findings: Findings, recorded: Mapping[str, Any], base: Path | None, adapters: Sequence[AdapterChoice]
) -> None:
    lacking = [] if base else ["the base (-b)"]
    if len(adapters) != len(recorded["adapters"]):
        lacking.append("every adapter that was merged (-a)")
    findings.not_checked.append(
        f"the arithmetic, the plan and the figures of the certificate: that takes {' and '.join(lacking)}; "
        "so far the folder agrees with its certificate, which whoever changed both could have written"
    )
    if base is not None:
        tensors = open_checkpoint(base).tensors
        records = [r for r in recorded["records"] if r["name"] in tensors]
        failures = [
            f"{place(tensors[r['name']])} is not the tensor that was merged"
            for r in records
            if r["operation"] == "copied" and hash_tensor(tensors[r["name"]]) != r["hash_in"]
        ]
        findings.judge("base_hashes", "the tensors that were copied are the base's", failures)


# --- from base and adapters --------------------------------------------------------------------------------


def _again(
    findings: Findings,
    folder: Path,
    recorded: Mapping[str, Any],
    base: Path,
    adapters: Sequence[AdapterChoice],
    outputs: Mapping[str, TensorInfo],
    certify: Certify,
    progress: Progress,
) -> None:
    from lora_export.merging import plan

    options = _options(recorded["options"], folder / NAME)
    try:
        planned = plan(base, adapters, options)
    except LoraExportError as error:
        findings.fail("plan", f"base and adapters do not make this model: {_words(error)}")
        return
    shards = describe_shards(planned)
    findings.judge(
        "plan", f"{len(planned.tensors)} tensors have the planned shape and type", _unplanned(planned, outputs)
    )
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        again = Path(scratch)
        write_beside(planned, companion_files(base), again)
        beside = describe_files(again, shards)
    files = dict(sorted((beside | shards).items()))
    failures = [
        f"{name} is not what the merge writes" for name, wanted in files.items() if not _is(folder / name, wanted)
    ]
    failures += [f"{n} is no file that the merge writes" for n in sorted(recorded["files"].keys() - files.keys())]
    findings.judge("written_files", f"{len(files)} files are what a merge writes, headers byte for byte", failures)
    if outputs.keys() >= planned.tensors.keys():
        recheck = Recheck(planned, outputs, certify, progress)
        recheck.run()
        rows = "all rows" if certify == "full" else "sampled rows"
        findings.judge("arithmetic", f"{rows} of every computed tensor are what float64 gives", recheck.beyond)
        findings.not_checked += [f"the arithmetic of {n}: {why}" for n, why in recheck.unchecked.items()]
        weights = [c.weight for c in adapters]
        found = certificate_of(
            planned, weights, recheck.records, recheck.survival, base_checks(planned), recheck.unchecked, files
        )
        compare(findings, recorded, found)
    else:
        findings.not_checked.append("arithmetic and figures: tensors are missing")


def _is(path: Path, wanted: Mapping[str, Any]) -> bool:
    return path.is_file() and not _file(path, path.name, wanted)


def _unplanned(planned: MergePlan, outputs: Mapping[str, TensorInfo]) -> Iterator[str]:
    homes = {t.name: s.file for s in planned.shards for t in s.tensors}
    for name, tensor in planned.tensors.items():
        found = outputs.get(name)
        if found is None:
            yield f"{name}: planned, and not there"
        elif (found.dtype, found.shape, found.file.name) != (tensor.output.dtype, tensor.output.shape, homes[name]):
            yield (
                f"{place(found)}: {found.dtype} {list(found.shape)}, planned is {tensor.output.dtype} "
                f"{list(tensor.output.shape)} in {homes[name]}"
            )
    for name in outputs.keys() - planned.tensors.keys():
        yield f"{place(outputs[name])}: not planned"


# --- the two documents -------------------------------------------------------------------------------------


def _words(error: LoraExportError) -> str:
    """An error on one line."""
    parts = [error.found, error.where and f"in {error.where}", error.tensor and f"tensor {error.tensor}"]
    return ", ".join(p for p in parts if p)
