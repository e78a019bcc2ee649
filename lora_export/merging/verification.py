"""A merged folder checked again later, with its certificate as something to be proved and not as a witness.

What the certificate says is computed again: from the folder's own bytes, and, where base and adapters are given,
from a new plan, float64 rows and the files that a merge would write. Then the two must agree, field by field.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lora_export import documents
from lora_export.checkpoint import open_adapter_files, open_checkpoint
from lora_export.checkpoint.companions import companion_files
from lora_export.checkpoint.hashing import hash_tensor
from lora_export.checkpoint.header import read_header
from lora_export.choices import Certify
from lora_export.contracts import AdapterChoice, Finding, MergeOptions, Progress, TensorInfo, Verification
from lora_export.documents import Kind
from lora_export.errors import CheckpointError, InputError, LoraExportError, plain
from lora_export.files import plain_name, read_sealed, refuse_outward_link, sha256
from lora_export.merging.beside import write_beside
from lora_export.merging.certificate import (
    NAME,
    SCHEMA_VERSION,
    Files,
    adapter_hashes,
    certificate_of,
    describe_files,
    describe_shards,
)
from lora_export.merging.plan import MergePlan
from lora_export.merging.recheck import Recheck, place
from lora_export.merging.right_base import base_checks

_RECORD: Kind = {
    "name": str, "operation": str, "dtype": str, "shape": [int], "kinds": [str], "checked": int, "saturated": int,
    **dict.fromkeys(("relative_delta", "survival", "max_ulps", "mean_ulps"), (None, float)),
    **dict.fromkeys(("hash_in", "hash_out"), (None, str)),
}  # fmt: skip
_FILE: Kind = ({"size": int, "sha256": str}, {"size": int, "header_sha256": str})
_CERTIFICATE: Kind = {
    "schema_version": int, "tool": {"name": str, "version": str}, "versions": {str: str}, "options": dict,
    "base": {"files": {str: {"size": int}}}, "tensors": {str: int}, "unchecked": {str: str}, "records": [_RECORD],
    "adapters": [{"kind": str, "weight": float, "base_model": (None, str), "sha256": {str: str}}],
    "adapter_tensors": {"used": int, "total": int}, "delta_survival": (None, float), "files": {str: _FILE},
    "base_checks": [{"name": str, "outcome": str, "note": str}],
}  # fmt: skip
# Recomputed on another processor, sums differ in their last digits; fp32 sums earlier than float64 ones.
_CLOSE = {"survival": 1e-4, "delta_survival": 1e-4, "relative_delta": 1e-4, "max_ulps": 1e-6, "mean_ulps": 1e-6}
# No trace of these is in the folder; a hash is compared where the bytes are.
_UNPROVABLE = ("tool.version", "versions", "options.device", "options.max_memory", "options.allow_nonfinite")
_WHERE_IT_LIES = ("name", "revision")  # checks of the right base that go by where it is


@dataclass
class Findings:
    """What was checked. A name that nothing failed under is a check that passed."""

    done: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def judge(self, name: str, passed: str, failures: Iterator[str] | Sequence[str]) -> None:
        found = [Finding(name, False, plain(note)) for note in failures]
        self.done += found or [Finding(name, True, plain(passed))]

    def fail(self, name: str, note: str) -> None:
        self.done.append(Finding(name, False, plain(note)))

    def result(self) -> Verification:
        return Verification(tuple(self.done), tuple(self.not_checked))


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


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of a folder, its seal and kinds checked. InputError says what is wrong with it."""
    recorded = read_sealed(folder / NAME)
    version = recorded.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"the certificate has schema version {version!r}",
            where=folder / NAME,
            expected=f"version {SCHEMA_VERSION}",
            next_step="verify with the lora-export that wrote it",
        )
    documents.check(recorded, _CERTIFICATE, "the certificate", folder / NAME)
    _options(recorded["options"], folder / NAME)
    return recorded


def recorded_options(recorded: Mapping[str, Any], folder: Path) -> MergeOptions:
    """The options of the merge that a certificate is of."""
    return _options(recorded["options"], folder / NAME)


def _options(recorded: Mapping[str, Any], where: Path) -> MergeOptions:
    hints = get_type_hints(MergeOptions)
    names = {f.name for f in fields(MergeOptions)} - {"force"}
    if set(recorded) != names:
        raise InputError("the options are not those of a merge", where=where, expected=", ".join(sorted(names)))
    for name, value in recorded.items():
        choices = get_args(hints[name])
        kinds = choices or (hints[name],)
        good = value in choices if choices and isinstance(choices[0], str) else type(value) in kinds
        if not good:
            raise InputError(f"the option {name} is {value!r}", where=where)
    return MergeOptions(**recorded)


# --- the folder alone --------------------------------------------------------------------------------------


def _files(findings: Findings, folder: Path, recorded: Mapping[str, Any]) -> None:
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} - {NAME}
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
        _compare(findings, recorded, found)
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


def _compare(findings: Findings, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """What the certificate says against what was computed again."""
    recorded, found = (_comparable(d) for d in (recorded, found))
    failures = [
        f"{place}: the certificate says {said}, found is {is_}"
        for place, said, is_ in _differences(recorded, found)
    ]
    findings.judge("figures", "every count, figure and hash of the certificate was found again", failures)
    findings.not_checked.append(
        f"{', '.join(_UNPROVABLE)}, and the name and revision of the base: no bytes of the folder depend on them"
    )


def _comparable(document: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(document)
    del kept["versions"]
    kept["tool"] = {"name": document["tool"]["name"]}
    kept["options"] = {k: v for k, v in document["options"].items() if f"options.{k}" not in _UNPROVABLE}
    kept["base_checks"] = [c for c in document["base_checks"] if c["name"] not in _WHERE_IT_LIES]
    kept["records"] = {r["name"]: r for r in document["records"]} | {"": [r["name"] for r in document["records"]]}
    return kept


def _differences(
    said: Any, found: Any, place: str = "", key: str = "", slack: float = 0.0
) -> Iterator[tuple[str, Any, Any]]:
    """slack: how much figures may differ besides, relatively."""
    if isinstance(said, dict) and isinstance(found, dict):
        slack = _fp32_slack(found)
        for name in [*said, *(n for n in found if n not in said)]:
            inner = f"{place} {name}".strip()
            yield from _differences(said.get(name, "nothing"), found.get(name, "nothing"), inner, name, slack)
    elif isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for at, pair in enumerate(zip(said, found, strict=True)):
            yield from _differences(*pair, f"{place}[{at}]", key, slack)
    elif isinstance(said, float) and isinstance(found, float) and key in _CLOSE:
        if not math.isclose(said, found, rel_tol=_CLOSE[key] + slack, abs_tol=1e-9):
            yield place, said, found
    elif type(said) is not type(found) or said != found:
        yield place, said, found


def _fp32_slack(document: Mapping[str, Any]) -> float:
    """What fp32 loses of a change that is small beside its weight: 2⁻²² of the weight, in units of the change.

    Of a tensor's record, or of a whole certificate the largest of its tensors.
    """
    records = document.get("records")
    if isinstance(records, dict):
        return max((_fp32_slack(r) for r in records.values() if isinstance(r, dict)), default=0.0)
    delta = document.get("relative_delta")
    return min(0.1, 2.0**-22 / delta) if isinstance(delta, float) and delta > 0 else 0.0


def _words(error: LoraExportError) -> str:
    """An error on one line."""
    parts = [error.found, error.where and f"in {error.where}", error.tensor and f"tensor {error.tensor}"]
    return ", ".join(p for p in parts if p)
