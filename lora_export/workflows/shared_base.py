"""A base that many runs share: its export, what it answers, and the latency of its graph, measured once."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import BenchmarkResult, ExportResult, MergeOptions, Progress
from lora_export.errors import OutputError
from lora_export.storage.sealed import sha256
from lora_export.workflows.trained_base import stand_in

if TYPE_CHECKING:
    from lora_export.merging import MergePlan
    from lora_export.validation.known import KnownBase


@dataclass(frozen=True)
class SharedBase:
    """What a run need not make of its base again.

    export: the base, exported as the run's own options would; measured: base, merged and unmerged graph of one
    adapter, None where they were not; claim: which adapter's, when and on what, in words; known: what the base
    answers; home: a folder of this machine for what else is made of the base once.
    """

    export: ExportResult
    known: "KnownBase | None"
    home: Path
    measured: BenchmarkResult | None = None
    claim: str = ""


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


def same_graph(shared: SharedBase, exported: ExportResult) -> tuple[str, ...]:
    """The SHA-256 of each graph, if all of this export's are the base's byte for byte; () if not."""
    if exported.graphs != shared.export.graphs:
        return ()
    own = tuple(sha256(path) for path in exported.paths)
    return own if own == tuple(sha256(path) for path in shared.export.paths) else ()


def measured_before(shared: SharedBase, exported: ExportResult) -> BenchmarkResult | None:
    """The measurement of the base's graph, if that is this export's graph, too; None where it is not, or where
    nothing was measured. A note says exactly what is claimed."""
    hashes = same_graph(shared, exported) if shared.measured is not None else ()
    if shared.measured is None or not hashes:
        return None
    if shared.measured.graph_identical and not _same_work(shared, exported, shared.measured.provider):
        return None
    files = ", ".join(f"{name} {digest}" for name, digest in zip(exported.graphs, hashes, strict=True))
    whose = "whose graph is the same file" if len(hashes) == 1 else "whose graphs are the same files"
    note = f"{shared.claim}; not measured again for this adapter, {whose}, with the SHA-256 {files}"
    return replace(shared.measured, notes=(*shared.measured.notes, note), samples={}, conditions={})


def _same_work(shared: SharedBase, exported: ExportResult, provider: str) -> bool:
    """Whether ONNX Runtime makes one graph of equal files, whose constants may lie in data files that differ."""
    from lora_export.onnx_export.graphs.identity import compare, one_stored

    pairs = zip(shared.export.paths, exported.paths, strict=True)
    return (
        all(one_stored(*pair) for pair in pairs) or compare(shared.export.paths, exported.paths, provider).identical
    )


def stand_in_once(
    shared: SharedBase, base: Path, merged: Path, options: MergeOptions, memory: int | None, progress: Progress
) -> Path | None:
    """What `stand_in` makes of a quantized base, once for all runs on this machine."""
    made = shared.home / "stand-in"
    if made.is_dir():
        return made
    try:
        return stand_in(base, merged, options, memory, shared.home, progress)
    except OutputError:
        if made.is_dir():  # by another process, meanwhile
            return made
        raise
