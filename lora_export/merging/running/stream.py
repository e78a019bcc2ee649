"""A merge that is never written as a checkpoint: a source whose tensors are computed when their bytes are read.

An exporter that streams weights takes them from here, so that base and adapter go straight into its own file. What
stays on disk of the merged folder is everything but the large numbers, which an export needs for the graph alone.
"""

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.checkpoint.companions import companion_files
from lora_export.contracts import Interference, TensorInfo, TensorSource
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.audit import Auditor
from lora_export.merging.running.companions import write_beside
from lora_export.merging.running.layout import TensorPass, places
from lora_export.merging.running.tensor import TensorWork
from lora_export.storage.workers import OpenFile

if TYPE_CHECKING:
    import torch

SMALL = 2**14  # elements of a tensor that the outline holds: an exporter may look at them (a bias of zeros)


@dataclass
class _Digested:
    """A sink that keeps the bytes from `start` on, or with `data` empty none."""

    data: bytearray
    start: int

    def write(self, data: bytes | memoryview, at: int) -> None:
        if self.data:
            self.data[at - self.start : at - self.start + len(data)] = data

    def fileno(self) -> int | None:
        return None


@dataclass
class MergedSource(TensorSource):
    """The tensors of a plan's output. `tensors` are as they would lie in the plan's shards in `folder`.

    A tensor whose hash is asked for is computed for it once more and audited; as many of those as fit into `keep`
    bytes are kept for later reads.
    """

    plan: MergePlan
    folder: Path
    tensors: Mapping[str, TensorInfo] = field(init=False)
    warnings: list[str] = field(default_factory=list)
    interference: tuple[Interference, ...] = ()
    keep: int = 0
    audit: Auditor = field(init=False)
    _kept: dict[str, bytearray] = field(default_factory=dict)
    _work: dict[str, TensorWork] = field(default_factory=dict)
    _whole: dict[str, "torch.Tensor"] = field(default_factory=dict)  # of tensors that have no rows of their own
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tensors = places(self.plan, self.folder, self)
        self.audit = Auditor(self.plan)

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """CheckpointError for NaN and infinity."""
        tensor = self.plan.tensors[info.name]
        if tensor.operation == "copied":
            assert tensor.source is not None
            tensor.source.source.read_into(tensor.source, start, into)
        elif info.name in self._kept:
            into[:] = self._kept[info.name][start : start + len(into)]
        elif into:
            import torch

            first, last = start // info.row_nbytes, -(-(start + len(into)) // info.row_nbytes)
            rows = self._rows(tensor, first, last).contiguous().reshape(-1).view(torch.uint8).numpy()
            skipped = start - first * info.row_nbytes
            into[:] = memoryview(rows.data)[skipped : skipped + len(into)]

    def known_hash(self, name: str) -> str | None:
        """The tensor is audited for it, once."""
        if self.audit.record(name) is None:
            tensor, place = self.plan.tensors[name], self.tensors[name]
            with self._lock:
                kept = place.nbytes if tensor.operation != "copied" and place.nbytes <= self.keep else 0
                self.keep -= kept
            sink = _Digested(bytearray(kept), place.start)
            jobs = list(TensorPass(self.audit, tensor, sink, place).jobs())
            for job in jobs:
                job.run()
            if kept:
                self._kept[name] = sink.data
            for job in jobs:
                job.done()
        record = self.audit.record(name)
        return record.hash_out if record else None

    def _rows(self, tensor: PlannedTensor, start: int, stop: int) -> "torch.Tensor":
        name = tensor.output.name
        if not tensor.row_wise:
            with self._lock:
                if name not in self._whole:
                    self._whole.clear()  # the others have been written
                    self._whole[name] = self._new_work(tensor).compute(0, tensor.height)
                return self._whole[name].reshape(tensor.height, *tensor.shape[1:])[start:stop]
        with self._lock:
            work = self._work.setdefault(name, self._new_work(tensor))
        return work.compute(start, stop)

    def _new_work(self, tensor: PlannedTensor) -> TensorWork:
        options = self.plan.options
        return TensorWork(tensor, self.plan.base, options.allow_nonfinite, options.device)


def write_outline(source: MergedSource) -> list[str]:
    """The merged folder without large numbers: shards with holes, which take no space, and all other files.

    Returns warnings about the other files.
    """
    plan, folder = source.plan, source.folder
    folder.mkdir(exist_ok=True)
    for shard in plan.shards:
        with contextlib.closing(OpenFile.create(folder / shard.file)) as out:
            out.write(shard.header, 0)
            out.resize(len(shard.header) + sum(t.nbytes for t in shard.tensors))
            for output in shard.tensors:
                info = source.tensors[output.name]
                if info.nbytes and prod(output.shape) <= SMALL:
                    source.copy_to(info, 0, info.nbytes, out, info.start)
    return write_beside(plan, companion_files(plan.base.folder), folder)
