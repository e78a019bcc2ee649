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


@dataclass(frozen=True)
class SharedBase:
    """What a run need not make of its base again.

    export: the base, exported as the run's own options would; measured: base, merged and unmerged graph of one
    adapter, None where they were not; claim: which adapter's, when and on what, in words; home: a folder of this
    machine for what else is made of the base once.
    """

    export: ExportResult
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


def measured_before(shared: SharedBase, exported: ExportResult) -> BenchmarkResult | None:
    """The measurement of the base's graph, which is this export's graph byte for byte; None where it is not, or where
    nothing was measured. A note says exactly what is claimed."""
    if shared.measured is None or exported.graphs != shared.export.graphs:
        return None
    own = [sha256(path) for path in exported.paths]
    if own != [sha256(path) for path in shared.export.paths]:
        return None
    files = ", ".join(f"{name} {digest}" for name, digest in zip(exported.graphs, own, strict=True))
    plural = len(own) > 1
    note = (
        f"{shared.claim}; not measured for this adapter, whose graph{'s are' if plural else ' is'} the same "
        f"file{'s' if plural else ''}, with the SHA-256 {files}"
    )
    return replace(shared.measured, notes=(*shared.measured.notes, note), samples={}, conditions={})


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
