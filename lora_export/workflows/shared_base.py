"""A base that many runs share: its export, what it answers, and the latency of its graph, measured once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_export.contracts import AdapterChoice, BenchmarkResult, ExportResult, MergeOptions, Progress, StoryOptions
from lora_export.errors import OutputError
from lora_export.folder_files import SENTENCE_MODULES
from lora_export.storage.sealed import sha256
from lora_export.workflows.budget import searches
from lora_export.workflows.trained_base import stand_in

if TYPE_CHECKING:
    from lora_export.merging import MergePlan
    from lora_export.validation.known import KnownBase


class Keeper(Protocol):
    """Keeps what a run makes of its base for the next one."""

    def export(self, made: ExportResult) -> ExportResult:
        """The base's export, where it is from now on."""

    def measurement(self, base: ExportResult, merged: ExportResult, made: BenchmarkResult) -> None: ...


@dataclass(frozen=True)
class SharedBase:
    """What a run need not make of its base again: nothing, by default.

    export: the base, exported as the run's own options would; measured: base, merged and unmerged graph of one
    adapter, None where they were not; claim: which adapter's, when and on what, in words; known: what the base
    answers; home: a folder of this machine for what else is made of the base once; seed: with which validations
    draw the same inputs, whose answers are known; keeper: None where nothing is kept for the next run.
    """

    export: ExportResult | None = None
    known: "KnownBase | None" = None
    home: Path | None = None
    measured: BenchmarkResult | None = None
    claim: str = ""
    seed: int | None = None
    keeper: Keeper | None = None


def why_not_exported_alike(options: StoryOptions, base: Path) -> str:
    """What in options gives the base of each adapter an export of its own; "" if nothing does."""
    export, how = options.export, options.export.quantization
    if searches(options, base):
        return "--max-size or --min-survival chooses the bits of each weight for this adapter"
    if export.graph_from is not None:
        return "--graph-from names an export of its own"
    if how.algorithm == "gptq":
        return "--quantizer gptq rounds the base by what texts do to this adapter's model"
    if dependent := next((k for k in how.keep if k in ("touched", "auto")), None):
        return f"--keep {dependent} depends on this adapter"
    if how.activations != "float":
        return f"--activations {how.activations}: no export takes such a graph from another one"
    return ""


def why_other_modules(base: Path, adapters: Sequence[AdapterChoice]) -> str:
    """What modules of sentence-transformers do to the graph; "" if there are none."""
    homes = [base, *(a.folder for a in adapters)]
    found = any((home / SENTENCE_MODULES).is_file() for home in homes)
    return "modules of sentence-transformers belong to the graph" if found else ""


def why_not_shared(planned: "MergePlan") -> str:
    """What in a plan gives the merged model a graph, a class or a vocabulary of its own; "" if nothing does."""
    if planned.model is not None:
        return f"the merged model is a {planned.model.architecture}, which the base is not"
    for name, tensor in planned.tensors.items():
        if tensor.quantized is not None:
            continue
        if tensor.source is None or tensor.source.name != name:
            return f"{name} is not a tensor of the base"
        if tensor.source.shape != tensor.shape:
            return f"{name} has another shape than in the base"
    return ""


def base_of(shared: SharedBase, make: Callable[[], ExportResult]) -> ExportResult:
    """The base's export: the one that is there, or a new one, which is kept if this run keeps anything."""
    if shared.export is not None:
        return shared.export
    made = make()
    return shared.keeper.export(made) if shared.keeper is not None else made


def same_graph(base: ExportResult, exported: ExportResult) -> tuple[str, ...]:
    """The SHA-256 of each graph, if all of this export's are the base's byte for byte; () if not."""
    if exported.graphs != base.graphs:
        return ()
    own = tuple(sha256(path) for path in exported.paths)
    return own if own == tuple(sha256(path) for path in base.paths) else ()


def keep_measured(shared: SharedBase, base: ExportResult, merged: ExportResult, made: BenchmarkResult) -> None:
    """Keep what was measured of this export's graph for the next run, if this run keeps anything."""
    if shared.keeper is not None:
        shared.keeper.measurement(base, merged, made)


def measured_before(shared: SharedBase, exported: ExportResult) -> BenchmarkResult | None:
    """The measurement of the base's graph, if that is this export's graph, too; None where it is not, or where
    nothing was measured. A note says exactly what is claimed. One that was slower is no other adapter's: its graph
    was not why."""
    if shared.measured is None or shared.export is None or shared.measured.verdict == "slower":
        return None
    hashes = same_graph(shared.export, exported)
    if not hashes:
        return None
    if shared.measured.graph_identical and not _same_work(shared.export, exported, shared.measured.provider):
        return None
    files = ", ".join(f"{name} {digest}" for name, digest in zip(exported.graphs, hashes, strict=True))
    whose = "whose graph is the same file" if len(hashes) == 1 else "whose graphs are the same files"
    note = f"{shared.claim}; not measured again for this adapter, {whose}, with the SHA-256 {files}"
    return replace(shared.measured, notes=(*shared.measured.notes, note))


def _same_work(base: ExportResult, exported: ExportResult, provider: str) -> bool:
    """Whether ONNX Runtime makes one graph of equal files, whose constants may lie in data files that differ."""
    from lora_export.onnx_export.graphs.identity import compare, one_stored

    pairs = list(zip(base.paths, exported.paths, strict=True))
    return all(one_stored(*pair) for pair in pairs) or compare(base.paths, exported.paths, provider).identical


def stand_in_once(
    shared: SharedBase,
    base: Path,
    merged: Path,
    options: MergeOptions,
    memory: int | None,
    work: Path,
    progress: Progress,
) -> Path | None:
    """What `stand_in` makes of a quantized base: in `work`, or once for all runs on this machine that share it."""
    if shared.home is None:
        return stand_in(base, merged, options, memory, work, progress)
    made = shared.home / "stand-in"
    if made.is_dir():
        return made
    try:
        return stand_in(base, merged, options, memory, shared.home, progress)
    except OutputError:
        if made.is_dir():  # by another process, meanwhile
            return made
        raise
