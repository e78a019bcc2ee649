"""Another adapter in a merged folder, or in its ONNX export: W₀ + Δ₁ becomes W₀ + Δ₂.

Taking Δ₁ off the merged numbers would leave its rounding behind. So a switch is a fresh merge, or a fresh set of
weights for the graph of an export, made in a folder beside the old one; then the two exchange their names in one
step, and the old one is removed. Nothing of an earlier switch is kept, so nothing of one has to be trusted.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import AdapterChoice, MergeOptions, Progress, TensorRecord
from lora_export.errors import CheckpointError, InputError
from lora_export.manifest import is_run
from lora_export.merging import CERTIFICATE, MergePlan, begin_stream, merge, plan, prepare
from lora_export.merging.certificate.document import adapter_hashes
from lora_export.packages.contents import is_package


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
    prepare((options or MergeOptions()).device)
    started = time.monotonic()
    if (folder / CERTIFICATE).is_file():
        found = _merged_folder(folder, base, before, after, progress)
    elif (folder / "weights-map.json").is_file():
        found = _export(folder, base, before, after, progress, options or MergeOptions())
    else:
        raise InputError(
            "no merged folder and no export whose adapter could be switched",
            where=folder,
            expected=f"a folder with {CERTIFICATE}, or an export with weights-map.json",
            next_step="lora-export inspect shows what a folder is",
        )
    return replace(found, seconds=time.monotonic() - started)


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
    named = open_adapter_files(adapter)[0].get("base_model_name_or_path")
    if not named:
        raise InputError(
            "the adapter does not name its base",
            where=adapter,
            expected="the base",
            next_step="the same command with -b BASE",
        )
    return str(named)


def _described(adapters: Sequence[AdapterChoice]) -> list[dict[str, Any]]:
    """Adapters as a certificate knows them."""
    found = []
    for choice in adapters:
        tensors = open_adapter_files(choice.folder)[1].tensors
        hashes = adapter_hashes(choice.folder, {t.file for t in tensors.values()})
        found.append({"sha256": hashes, "weight": choice.weight})
    return found


def _touched(planned: MergePlan) -> set[str]:
    return {name for name, tensor in planned.tensors.items() if tensor.updates}


def _check_layout(folder: Path, first: MergePlan, second: MergePlan) -> None:
    """InputError unless both make the same files, but for numbers."""
    headers = [{s.file: s.header for s in p.shards} for p in (first, second)]
    configs = [(dict(p.config_changes), p.config_removals) for p in (first, second)]
    if headers[0] != headers[1] or configs[0] != configs[1]:
        raise InputError(
            "the two adapters need folders of different layout (a resized vocabulary, an untied head, new tensors)",
            where=folder,
            expected="adapters that change numbers alone",
            next_step="lora-export merge -b BASE -a ADAPTER -o OUT",
        )


# --- a merged folder ---------------------------------------------------------------------------------------


def _merged_folder(
    folder: Path, base: Path, before: Sequence[AdapterChoice], after: Sequence[AdapterChoice], progress: Progress
) -> Switched:
    from lora_export.merging.certificate.compare import read_certificate, recorded_options

    recorded = read_certificate(folder)
    options = recorded_options(recorded, folder)
    _check_holds(folder, recorded["adapters"], _described(before))
    old, new = plan(base, before, options), plan(base, after, options)
    _check_layout(folder, old, new)
    hashes = {r["name"]: r["hash_in"] for r in recorded["records"]}
    merge(
        base, after, folder, replace(options, force=True), progress,
        accept=lambda records: _refuse_other_base(base, hashes, records),
    )  # fmt: skip
    return Switched(folder, "merged", len(_touched(old) | _touched(new)), new.nbytes)


def _refuse_other_base(base: Path, before: Mapping[str, str | None], records: Sequence[TensorRecord]) -> None:
    for found in records:
        if before.get(found.name) not in (None, found.hash_in):
            raise CheckpointError(
                "this tensor of the base is not the one that the folder was merged from",
                where=base,
                tensor=found.name,
                expected="the same base",
                next_step="give that base as -b",
            )


def _check_holds(folder: Path, recorded: Sequence[Mapping[str, Any]], holds: Sequence[Mapping[str, Any]]) -> None:
    found = [{"sha256": r["sha256"], "weight": r["weight"]} for r in recorded]
    if found != list(holds):
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
    from lora_export.merging import MergedSource
    from lora_export.merging.running.write import one_thread_each
    from lora_export.onnx_export import adapters_beside, reweight
    from lora_export.onnx_export.weights.holding import check_holds

    beside = adapters_beside(folder)
    if beside:
        raise InputError(
            f"other adapters share the weights of this folder: {', '.join(beside)}",
            where=folder,
            expected="an export of its own",
            next_step="lora-export export --graph-from EXPORT --shared-as NAME adds another adapter beside them",
        )
    old, new = plan(base, before, options), plan(base, after, options)
    _check_layout(folder, old, new)
    changed = _touched(old)
    check_holds(folder, MergedSource(old, folder), sorted(changed), sorted(set(old.tensors) - changed))
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch, one_thread_each():
        source = begin_stream(base, after, Path(scratch, "outline"), options, progress)
        source.keep = options.max_memory // 2
        made = reweight(folder, source.folder, folder, source=source, force=True, progress=progress)
    for text in (*new.warnings, *source.warnings):
        progress.warn(text)
    return Switched(folder, "onnx", len(changed | _touched(new)), sum(made.files.values()))
