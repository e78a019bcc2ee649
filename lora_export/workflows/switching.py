"""Another adapter in a merged folder, or in its ONNX export: W₀ + Δ₁ becomes W₀ + Δ₂.

Taking Δ₁ off the merged numbers would leave its rounding behind. So a switch is a fresh merge, or a fresh set of
weights for the graph of an export, made in a folder beside the old one; then the two exchange their names in one
step, and the old one is removed. Nothing of an earlier switch is kept, so nothing of one has to be trusted.
"""

import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.checkpoint import open_adapter_files
from lora_export.checkpoint.adapter_files import adapter_hashes, single_file
from lora_export.checkpoint.hashing import hash_all
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.contracts import AdapterChoice, MergeOptions, Progress, TensorRecord
from lora_export.errors import CheckpointError, InputError
from lora_export.manifest import is_run
from lora_export.merging import CERTIFICATE, MergedSource, MergePlan, begin_stream, merge_planned, plan
from lora_export.merging.certificate.document import Certificate, FileRecord, read_certificate
from lora_export.merging.running.layout import one_thread_each
from lora_export.packages.contents import is_package
from lora_export.workflows.pipelines.switching import switch_pipeline

CONFIG = "config.json"
LOOKED_AT = 3  # tensors of an export that each adapter changes, or leaves, by which it is recognized


@dataclass(frozen=True)
class Switched:
    """kind: merged or onnx; tensors: how many either adapter changes; nbytes: of all weights that were written."""

    output: Path
    kind: str
    tensors: int
    nbytes: int
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "kind": self.kind,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
        }


def switch(
    folder: Path,
    base: Path,
    before: Sequence[AdapterChoice],
    after: Sequence[AdapterChoice],
    progress: Progress,
    options: MergeOptions | None = None,
) -> Switched:
    """Put `after` in the place of `before`. options: of the merge of which an export was made.

    A merged folder knows its own. InputError or CheckpointError if the folder does not hold `before` merged into
    `base`, or if the two need another layout (a resized vocabulary, an untied head). Until the end the folder is as
    it was.
    """
    _refuse_run(folder)
    started = time.monotonic()
    if (folder / CERTIFICATE).is_file() and is_pipeline(base):
        tensors, nbytes = switch_pipeline(folder, base, before, after, progress)
        switched = Switched(folder, "merged", tensors, nbytes)
    elif (folder / CERTIFICATE).is_file():
        switched = _merged_folder(folder, base, before, after, progress)
    elif (folder / "weights-map.json").is_file() and not is_pipeline(base):
        switched = _export(folder, base, before, after, progress, options or MergeOptions())
    elif is_pipeline(base):
        raise InputError(
            "not a merged pipeline",
            where=folder,
            expected=f"a folder with {CERTIFICATE}; the base is a pipeline",
            next_step="for an export: lora-export export -m MERGED --graph-from ONNX -o NEW",
        )
    else:
        raise InputError(
            "neither a merged folder nor an export",
            where=folder,
            expected=f"a folder with {CERTIFICATE}, or an export with weights-map.json",
            next_step="lora-export inspect shows what a folder is",
        )
    return replace(switched, seconds=time.monotonic() - started)


def _refuse_run(folder: Path) -> None:
    """InputError for a run, a part of one, or a package: they tell of the adapter that they were made with."""
    home = folder.absolute()
    if is_package(home):
        raise InputError(
            "the folder is a package, whose manifest is about the adapter that is in it",
            where=home,
            expected="a merged folder or an export of its own",
            next_step="switch the export that the package was made of, or package another run",
        )
    run = next((p for p in (home, home.parent) if is_run(p)), None)
    if run is not None:
        part = home if run != home else home / "merged"
        raise InputError(
            "the folder is part of a run, whose report and manifest are about the adapter that is in it",
            where=run,
            expected="a folder of its own",
            next_step=f"cp -r {part} COPY, and switch that",
        )


def base_of(adapter: Path) -> str:
    """The base that an adapter names. InputError if it names none."""
    single = single_file(adapter)
    base = None if single else open_adapter_files(adapter)[0].get("base_model_name_or_path")
    if not base:
        raise InputError(
            "the adapter does not name its base",
            where=adapter,
            expected="the base",
            next_step="the same command with -b BASE",
        )
    return str(base)


def _touched(planned: MergePlan) -> set[str]:
    return {name for name, tensor in planned.tensors.items() if tensor.updates}


def _other_layout(folder: Path) -> InputError:
    return InputError(
        "the two adapters need folders of different layout (a resized vocabulary, an untied head, new tensors)",
        where=folder,
        expected="adapters that change numbers alone",
        next_step="lora-export merge -b BASE -a ADAPTER -o OUT",
    )


# --- a merged folder ---------------------------------------------------------------------------------------


def _merged_folder(
    folder: Path, base: Path, before: Sequence[AdapterChoice], after: Sequence[AdapterChoice], progress: Progress
) -> Switched:
    """One plan and one merge; what the folder holds now is in its certificate."""
    recorded = read_certificate(folder)
    _check_holds(folder, recorded, before)
    planned = plan(base, after, recorded.options)
    headers = {n: f.header_sha256 for n, f in recorded.files.items() if f.header_sha256 is not None}
    if headers != {s.file: hashlib.sha256(s.header).hexdigest() for s in planned.shards}:
        raise _other_layout(folder)

    def accept(stage: Path, records: Sequence[TensorRecord]) -> None:
        if FileRecord.of(stage / CONFIG) != recorded.files.get(CONFIG):
            raise _other_layout(folder)
        hashes = {r.name: r.hash_in for r in recorded.records}
        for record in records:
            if hashes.get(record.name) not in (None, record.hash_in):
                raise CheckpointError(
                    "this tensor of the base is not the one that the folder was merged from",
                    where=base,
                    tensor=record.name,
                    expected="the same base",
                    next_step="give that base as -b",
                )

    merge_planned(planned, folder, progress, force=True, accept=accept)
    touched = {r.name for r in recorded.records if r.kinds} | _touched(planned)
    return Switched(folder, "merged", len(touched), planned.nbytes)


def _check_holds(folder: Path, recorded: Certificate, adapters: Sequence[AdapterChoice]) -> None:
    """InputError unless the certificate names these adapters, with these weights."""
    given = []
    for choice in adapters:
        tensors = open_adapter_files(choice.folder)[1].tensors
        given.append((adapter_hashes(choice.folder, {t.file for t in tensors.values()}), choice.weight))
    if given != [(dict(a.sha256), a.weight) for a in recorded.adapters]:
        raise InputError(
            "the folder was not merged from the adapters of --from",
            where=folder / CERTIFICATE,
            expected="the adapters and weights that are in it, in their order",
            next_step="lora-export verify FOLDER -a ADAPTER says which file differs",
        )


# --- an export ---------------------------------------------------------------------------------------------


def _export(
    folder: Path,
    base: Path,
    before: Sequence[AdapterChoice],
    after: Sequence[AdapterChoice],
    progress: Progress,
    options: MergeOptions,
) -> Switched:
    from lora_export.onnx_export import adapters_beside, reweight

    beside = adapters_beside(folder)
    if beside:
        raise InputError(
            f"other adapters share the weights of this folder: {', '.join(beside)}",
            where=folder,
            expected="an export of its own",
            next_step="lora-export export --graph-from EXPORT --shared-as NAME adds another adapter beside them",
        )
    old, new = plan(base, before, options), plan(base, after, options)
    if [(s.file, s.header) for s in old.shards] != [(s.file, s.header) for s in new.shards] or (
        (old.config_changes, old.config_removals) != (new.config_changes, new.config_removals)
    ):
        raise _other_layout(folder)
    changed = _touched(old)
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch, one_thread_each():
        source = begin_stream(new, Path(scratch, "outline"), progress)
        source.keep = options.max_memory // 2
        _check_made_of(folder, MergedSource(old, folder), changed)
        made = reweight(folder, source.folder, folder, source=source, force=True, progress=progress)
    for text in (*new.warnings, *source.warnings):
        progress.warn(text)
    return Switched(folder, "onnx", len(changed | _touched(new)), sum(made.files.values()))


def _check_made_of(folder: Path, held: MergedSource, changed: set[str]) -> None:
    """InputError unless the export was made of `held`, as far as the smallest tensors tell: those that its adapter
    changed, and the others."""
    from lora_export.onnx_export import tensor_hashes

    recorded = tensor_hashes(folder)
    if recorded.keys() != held.tensors.keys():
        odd = min(recorded.keys() ^ held.tensors.keys())
        raise _made_of_another(folder, "the export and this base have different tensors", odd)
    smallest = sorted(held.tensors, key=lambda n: (held.tensors[n].nbytes, n))
    mine, others = ([n for n in smallest if (n in changed) is touched][:LOOKED_AT] for touched in (True, False))
    for name, digest in hash_all(held, [*mine, *others]).items():
        if digest != recorded[name]:
            why = "the export does not hold this adapter" if name in changed else "the base is another"
            raise _made_of_another(folder, f"{why}: a tensor has another hash", name)


def _made_of_another(folder: Path, found: str, tensor: str) -> InputError:
    return InputError(
        found,
        where=folder,
        tensor=tensor,
        expected="an export of this base with the adapters of --from in it, merged with the same options",
        next_step="give the base, adapters and options of the merge that was exported",
    )
