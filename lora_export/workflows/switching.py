"""Another adapter in a merged folder, or in its ONNX export: W₀ + Δ₁ becomes W₀ + Δ₂.

The base is the truth: taking Δ₁ off the merged numbers would leave its rounding behind. So what either adapter
changes is computed from the base anew, to the very bytes of a fresh merge, and nothing else is written.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import AdapterChoice, MergeOptions, Progress, TensorRecord
from lora_export.errors import InputError
from lora_export.manifest import is_run
from lora_export.merging import CERTIFICATE, MergePlan, plan, prepare
from lora_export.merging.certificate import adapter_hashes
from lora_export.packages.contents import is_package
from lora_export.spare import Spare, exchanged


@dataclass(frozen=True)
class Switched:
    """tensors: how many were written; nbytes: of them; went_back: the spare held the new state already."""

    output: Path
    kind: str
    tensors: int
    nbytes: int
    share: float
    seconds: float
    went_back: bool
    spare: Path | None

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "kind": self.kind,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "share": self.share,
            "seconds": round(self.seconds, 3),
            "went_back": self.went_back,
            "spare": str(self.spare) if self.spare else None,
        }


def switch(
    folder: Path,
    base: Path,
    before: Sequence[AdapterChoice],
    after: Sequence[AdapterChoice],
    progress: Progress,
    keep_spare: bool = True,
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
        found = _merged_folder(folder, base, before, after, progress, keep_spare)
    elif (folder / "weights-map.json").is_file():
        found = _export(folder, base, before, after, progress, keep_spare, options or MergeOptions())
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
    """Adapters as a spare's seal and a certificate know them."""
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
    folder: Path,
    base: Path,
    before: Sequence[AdapterChoice],
    after: Sequence[AdapterChoice],
    progress: Progress,
    keep: bool,
) -> Switched:
    from lora_export.merging.certificate_check import read_certificate, recorded_options
    from lora_export.merging.switched import Rewriting

    recorded = read_certificate(folder)
    options, holds = recorded_options(recorded, folder), _described(before)
    _check_holds(folder, recorded["adapters"], holds)
    old, new = plan(base, before, options), plan(base, after, options)
    _check_layout(folder, old, new)
    with exchanged(folder, CERTIFICATE, keep, {"adapters": holds}) as spare:
        starts_as = recorded
        if spare.state is not None:
            starts_as = _of_one_base(spare, recorded) or recorded
        if spare.state is not None and spare.state.get("adapters") == _described(after):
            return _result(folder, "merged", 0, new, True, spare, keep)
        records = [TensorRecord(**_tuples(r)) for r in starts_as["records"]]
        names = {r.name for r in records if r.kinds} | _touched(new)
        progress.stage(f"switch: {len(names)} of {len(new.tensors)} tensors from the base and the new adapter")
        rewriting = Rewriting(new, names, records, starts_as["unchecked"])
        spare.prepare(rewriting.ranges(), (s.file for s in new.shards))
        rewriting.write(spare.place, [a.weight for a in after], progress)
        return _result(folder, "merged", len(names), new, False, spare, keep, names)


def _of_one_base(spare: Spare, recorded: Mapping[str, Any]) -> dict[str, Any] | None:
    """The spare's certificate; None, and no state, if it is of another base or of other options."""
    from lora_export.merging.certificate_check import read_certificate

    def made_of(document: Mapping[str, Any]) -> Any:
        return document["options"], {r["name"]: (r["hash_in"], r["dtype"]) for r in document["records"]}

    try:
        found = read_certificate(spare.place)
    except InputError:
        found = {}
    if not found or made_of(found) != made_of(recorded):
        spare.state = None
        return None
    return found


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}


def _check_holds(folder: Path, recorded: Sequence[Mapping[str, Any]], holds: Sequence[Mapping[str, Any]]) -> None:
    found = [{"sha256": r["sha256"], "weight": r["weight"]} for r in recorded]
    if found != list(holds):
        raise InputError(
            "the folder was not merged from the adapters of --from",
            where=folder / CERTIFICATE,
            expected="the adapters and weights that are in it, in their order",
            next_step="lora-export verify FOLDER -a ADAPTER says which file differs",
        )


def _result(
    folder: Path,
    kind: str,
    tensors: int,
    planned: MergePlan,
    went_back: bool,
    spare: Spare,
    keep: bool,
    names: Iterable[str] = (),
) -> Switched:
    nbytes = sum(planned.tensors[n].output.nbytes for n in names)
    place = spare.place if keep else None
    return Switched(folder, kind, tensors, nbytes, nbytes / max(1, planned.nbytes), 0.0, went_back, place)


# --- an export ---------------------------------------------------------------------------------------------


def _export(
    folder: Path,
    base: Path,
    before: Sequence[AdapterChoice],
    after: Sequence[AdapterChoice],
    progress: Progress,
    keep: bool,
    options: MergeOptions,
) -> Switched:
    from lora_export.merging import MergedSource
    from lora_export.merging.execute import one_thread_each
    from lora_export.onnx_export import adapters_beside, weights_map
    from lora_export.onnx_export.rewriting import Rewriting

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
    sources = MergedSource(old, folder), MergedSource(new, folder, keep=options.max_memory // 2)
    rewriting = Rewriting(folder, sources[1])
    rewriting.check_holds(sources[0], sorted(_touched(old)), sorted(set(old.tensors) - _touched(old)))
    holds: dict[str, Any] = {"adapters": _described(before), "touched": sorted(_touched(old))}
    with exchanged(folder, weights_map.NAME, keep, holds) as spare:
        if spare.state is not None:
            touched = {*spare.state["touched"], *holds["touched"]}
            spare.state = spare.state if rewriting.of_one_base(spare.place, touched) else None
        if spare.state is not None and spare.state.get("adapters") == _described(after):
            return _result(folder, "onnx", 0, new, True, spare, keep)
        names = set((spare.state or holds)["touched"]) | _touched(new)
        others = rewriting.hashes_of(spare.place if spare.state is not None else folder)
        progress.stage(f"switch: weights of {len(names)} of {len(new.tensors)} tensors are written anew")
        spare.prepare(rewriting.ranges(names), rewriting.others)
        with one_thread_each():
            nbytes = rewriting.write(spare.place, names, others, progress)
        total = sum(rewriting.found.sizes.values())
        result = _result(folder, "onnx", len(names), new, False, spare, keep)
        return replace(result, nbytes=nbytes, share=nbytes / max(1, total))
