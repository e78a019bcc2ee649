"""A merged folder against its own certificate, which is all that can be looked at without base and adapters."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_export.checkpoint import open_checkpoint
from lora_export.checkpoint.adapter_files import adapter_hashes, adapter_tensors
from lora_export.checkpoint.hashing import hash_tensor
from lora_export.checkpoint.header import header_bytes, read_header
from lora_export.contracts import AdapterChoice, Findings, TensorInfo
from lora_export.errors import CheckpointError, LoraExportError
from lora_export.merging.certificate.document import NAME, Certificate, FileRecord
from lora_export.storage.disk import regular_size
from lora_export.storage.sealed import plain_name, refuse_outward_link, sha256


def files(findings: Findings, folder: Path, recorded: Certificate) -> None:
    """Every file of the folder: those that the certificate names, as it names them, and no others."""
    present, failures = set(), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            refuse_outward_link(path)
        if path.is_symlink() and path.is_dir():
            failures.append(f"{name} is a link to a folder")
        elif not path.is_dir():
            present.add(name)
    present -= {NAME}
    wanted = recorded.files
    failures += [f"{n} is missing" for n in sorted(wanted.keys() - present)]
    failures += [f"{n} was added after the merge" for n in sorted(present - wanted.keys())]
    for name in sorted(present & wanted.keys()):
        failures += unlike(folder / name, name, wanted[name])
    findings.judge("files", f"{len(wanted)} files are there, with the recorded sizes and hashes", failures)


def unlike(path: Path, name: str, wanted: FileRecord) -> list[str]:
    """How a file differs from its record; of a shard, its size and its header count."""
    size = regular_size(path)
    if size is None:
        return [f"{name} is not a regular file"]
    if size != wanted.size:
        return [f"{name} has {size} bytes, the certificate says {wanted.size}"]
    if wanted.sha256 is not None:
        return [] if sha256(path) == wanted.sha256 else [f"{name} was changed: its SHA-256 differs"]
    header = hashlib.sha256(header_bytes(path)).hexdigest()
    return [] if header == wanted.header_sha256 else [f"the header of {name} was changed: its SHA-256 differs"]


def output_tensors(folder: Path, recorded: Certificate) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of the folder by name, and how their names, shapes and types differ from the certificate's."""
    there: dict[str, TensorInfo] = {}
    failures: list[str] = []
    shards = sorted(n for n, f in recorded.files.items() if f.header_sha256 is not None and plain_name(n))
    for name in shards:
        try:
            if (folder / name).is_file():
                there |= read_header(folder / name).tensors
        except CheckpointError as error:
            failures.append(words(error))
    records = {r.name: r for r in recorded.records}
    failures += [f"{n} is not there" for n in sorted(records.keys() - there.keys())]
    failures += [f"{place(there[n])} has no record" for n in sorted(there.keys() - records.keys())]
    for name in sorted(there.keys() & records.keys()):
        info, wanted = there[name], records[name]
        if (info.dtype, info.shape) != (wanted.dtype, wanted.shape):
            failures.append(f"{place(info)} is {info.dtype} {list(info.shape)}, not as recorded")
    return there, failures


def hashes(
    findings: Findings,
    recorded: Certificate,
    there: Mapping[str, TensorInfo],
    failures: Sequence[str],
    known: Mapping[str, str],
) -> None:
    """The hash of every tensor. failures: those of `output_tensors`; known: hashes that need not be taken again."""
    wanted = recorded.hashes
    both = [there[n] for n in sorted(there.keys() & wanted.keys())]

    def hashed(info: TensorInfo) -> str:
        return known.get(info.name) or hash_tensor(info)

    with ThreadPoolExecutor(2) as pool:
        other = [i for i, h in zip(both, pool.map(hashed, both), strict=True) if h != wanted[i.name]]
    notes = [*failures, *(f"{place(info)}: its hash is not the recorded one" for info in other)]
    findings.judge("output_hashes", f"the bytes of {len(there)} tensors are those that were written", notes)


def adapter_files(findings: Findings, recorded: Certificate, adapters: Sequence[AdapterChoice]) -> None:
    """Whether the adapters are those of the certificate, with their weights."""
    if not adapters:
        return
    wanted, failures = recorded.adapters, []
    if len(wanted) != len(adapters):
        failures.append(f"{len(adapters)} adapters were given, the certificate names {len(wanted)}")
    for choice, entry in zip(adapters, wanted, strict=False):
        tensors = adapter_tensors(choice.folder).tensors
        there = adapter_hashes(choice.folder, {t.file for t in tensors.values()})
        for name in sorted(there.keys() | entry.sha256.keys()):
            if there.get(name) != entry.sha256.get(name):
                failures.append(f"{choice.folder / name} is not the file that was merged")
        if choice.weight != entry.weight:
            failures.append(f"the weight is {choice.weight:g}, merged was {entry.weight:g}: give -a DIR:WEIGHT")
    findings.judge("adapter_hashes", f"{len(adapters)} adapters are those that were merged", failures)


def what_is_missing(
    findings: Findings, recorded: Certificate, base: Path | None, adapters: Sequence[AdapterChoice]
) -> None:
    """Say what cannot be known without the base and every adapter; with the base, look at what was copied."""
    lacking = [] if base else ["the base (-b)"]
    if len(adapters) != len(recorded.adapters):
        lacking.append("every adapter that was merged (-a)")
    findings.not_checked.append(
        "the weights, the arithmetic and the figures of the certificate, config.json, tokenizer, chat template, "
        f"generation config, index and every other file: that takes {' and '.join(lacking)}. The "
        "folder agrees with its certificate, but anyone who changed the folder could have changed both"
    )
    if base is not None:
        tensors = open_checkpoint(base).tensors
        copied = [r for r in recorded.records if r.name in tensors and r.operation == "copied"]
        failures = [
            f"{place(tensors[r.name])} is not the tensor that was merged"
            for r in copied
            if hash_tensor(tensors[r.name]) != r.hash_in
        ]
        findings.judge("base_hashes", "the tensors that were copied are the base's", failures)


def place(info: TensorInfo) -> str:
    """A tensor for people."""
    return f"{info.file.name}, tensor {info.name}"


def words(error: LoraExportError) -> str:
    """An error on one line."""
    parts = [error.found, error.where and f"in {error.where}", error.tensor and f"tensor {error.tensor}"]
    return ", ".join(p for p in parts if p)
