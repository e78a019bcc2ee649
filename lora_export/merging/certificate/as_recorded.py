"""A merged folder against its own certificate, which is all that can be looked at without base and adapters."""

import hashlib
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lora_export.checkpoint import open_adapter_files, open_checkpoint
from lora_export.checkpoint.hashing import hash_tensor
from lora_export.checkpoint.header import read_header
from lora_export.contracts import AdapterChoice, TensorInfo
from lora_export.errors import CheckpointError, LoraExportError
from lora_export.merging.certificate.compare import Findings
from lora_export.merging.certificate.document import NAME, Files, adapter_hashes
from lora_export.storage.sealed import plain_name, refuse_outward_link, sha256


def files(findings: Findings, folder: Path, recorded: Mapping[str, Any]) -> None:
    """Every file of the folder: those that the certificate names, as it names them, and no others."""
    present, failures = set(), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            refuse_outward_link(path)
        if path.is_symlink() and path.is_dir():
            failures.append(f"{name} is a link to a folder")
        elif not stat.S_ISDIR(path.stat().st_mode):
            present.add(name)
    present -= {NAME}
    wanted: Files = recorded["files"]
    failures += [f"{n} is missing" for n in sorted(wanted.keys() - present)]
    failures += [f"{n} was added after the merge" for n in sorted(present - wanted.keys())]
    for name in sorted(present & wanted.keys()):
        failures += unlike(folder / name, name, wanted[name])
    findings.judge("files", f"{len(wanted)} files are there, as large as they were, their hashes agree", failures)


def unlike(path: Path, name: str, wanted: Mapping[str, Any]) -> list[str]:
    """How a file differs from what is said of it, of a shard its size and its header."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return [f"{name} is no regular file"]
    if status.st_size != wanted["size"]:
        return [f"{name} has {status.st_size} bytes, the certificate says {wanted['size']}"]
    if "sha256" in wanted:
        return [] if sha256(path) == wanted["sha256"] else [f"{name} was changed: its SHA-256 is another"]
    found = hashlib.sha256(_header_bytes(path)).hexdigest()
    return [] if found == wanted["header_sha256"] else [f"the header of {name} was changed: its SHA-256 is another"]


def _header_bytes(path: Path) -> bytes:
    """Length and header of a safetensors file; of a damaged one, what is there of them."""
    with path.open("rb") as f:
        prefix = f.read(8)
        return prefix + f.read(min(int.from_bytes(prefix, "little"), path.stat().st_size))


def output_tensors(folder: Path, recorded: Mapping[str, Any]) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of the folder by name, and how their names, shapes and types differ from the certificate's."""
    found: dict[str, TensorInfo] = {}
    failures: list[str] = []
    for name in sorted(n for n, f in recorded["files"].items() if "header_sha256" in f and plain_name(n)):
        try:
            if (folder / name).is_file():
                found |= read_header(folder / name).tensors
        except CheckpointError as error:
            failures.append(words(error))
    records = {r["name"]: r for r in recorded["records"]}
    failures += [f"{n} is not there" for n in sorted(records.keys() - found.keys())]
    failures += [f"{place(found[n])} has no record" for n in sorted(found.keys() - records.keys())]
    for info in sorted((found[n] for n in found.keys() & records.keys()), key=lambda t: t.name):
        wanted = records[info.name]
        if (info.dtype, list(info.shape)) != (wanted["dtype"], wanted["shape"]):
            failures.append(f"{place(info)} is {info.dtype} {list(info.shape)}, not as recorded")
    return found, failures


def hashes(
    findings: Findings,
    recorded: Mapping[str, Any],
    found: Mapping[str, TensorInfo],
    failures: Sequence[str],
    known: Mapping[str, str],
) -> None:
    """The hash of every tensor. failures: those of `output_tensors`; known: hashes that need not be taken again."""
    records = {r["name"]: r["hash_out"] for r in recorded["records"]}
    both = sorted((found[n] for n in found.keys() & records.keys()), key=lambda t: t.name)

    def hashed(info: TensorInfo) -> str:
        return known.get(info.name) or hash_tensor(info)

    with ThreadPoolExecutor(2) as pool:
        other = [i for i, h in zip(both, pool.map(hashed, both), strict=True) if h != records[i.name]]
    notes = [*failures, *(f"{place(info)}: its hash is not the recorded one" for info in other)]
    findings.judge("output_hashes", f"the bytes of {len(found)} tensors are those that were written", notes)


def adapter_files(findings: Findings, recorded: Mapping[str, Any], adapters: Sequence[AdapterChoice]) -> None:
    """Whether the adapters are those of the certificate, with their weights."""
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


def what_is_missing(
    findings: Findings, recorded: Mapping[str, Any], base: Path | None, adapters: Sequence[AdapterChoice]
) -> None:
    """Say what cannot be known without the base and every adapter; with the base, look at what was copied."""
    lacking = [] if base else ["the base (-b)"]
    if len(adapters) != len(recorded["adapters"]):
        lacking.append("every adapter that was merged (-a)")
    findings.not_checked.append(
        "the weights, the arithmetic and the figures of the certificate, config.json, tokenizer, chat template, "
        f"generation config, index and every other file: that takes {' and '.join(lacking)}; so far the folder "
        "agrees with its certificate, which whoever changed both could have written"
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


def place(info: TensorInfo) -> str:
    """A tensor for people."""
    return f"{info.file.name}, tensor {info.name}"


def words(error: LoraExportError) -> str:
    """An error on one line."""
    parts = [error.found, error.where and f"in {error.where}", error.tensor and f"tensor {error.tensor}"]
    return ", ".join(p for p in parts if p)
