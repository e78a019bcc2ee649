"""A merge that is never written as a checkpoint: its tensors are computed when somebody asks for their rows.

An exporter that streams weights takes them from here, so that base and adapter go straight into its own file. What
stays on disk of the merged folder is everything but the large numbers, which an export needs for the graph alone.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.checkpoint.companions import companion_files
from lora_export.checkpoint.hashing import TensorHash, hash_parts, hash_tensor
from lora_export.checkpoint.reader import read_rows
from lora_export.contracts import Interference, TensorInfo, TensorRecord
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.companions import write_beside
from lora_export.merging.running.exact import Errors, ExactTensor, memory, refuse_beyond, runs_of, too_large
from lora_export.merging.running.survival import Survival
from lora_export.merging.running.tensor import Certified, TensorWork, record
from lora_export.storage.workers import BLOCK

if TYPE_CHECKING:
    import numpy as np
    import torch

SMALL = 2**14  # elements of a tensor that the outline holds: an exporter may look at them (a bias of zeros)


@dataclass
class MergedSource:
    """The tensors of a plan's output. `tensors` are as they would lie in the plan's shards in `folder`.

    A tensor that is hashed is computed for it once more, compared with float64, and gets its record; as many of
    those as fit into `keep` bytes are kept for whoever asks for their rows afterwards.
    """

    plan: MergePlan
    folder: Path
    tensors: Mapping[str, TensorInfo] = field(init=False)
    unchecked: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    interference: tuple[Interference, ...] = ()
    keep: int = 0
    _kept: dict[str, "torch.Tensor"] = field(default_factory=dict)
    _work: dict[str, TensorWork] = field(default_factory=dict)
    _whole: dict[str, "torch.Tensor"] = field(default_factory=dict)  # of tensors that have no rows of their own
    _records: dict[str, tuple[TensorRecord, Survival]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tensors = places(self.plan, self.folder)

    def rows(self, name: str, start: int, stop: int) -> "np.ndarray[Any, Any]":
        """Rows [start, stop) in the output's type, as numpy has it. CheckpointError for NaN and infinity."""
        import numpy as np

        found = self._rows(name, start, stop)
        if str(found.dtype) != "torch.bfloat16":
            return np.asarray(found.numpy())
        import ml_dtypes
        import torch

        return np.asarray(found.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))

    def hash(self, name: str) -> str:
        """Of the tensor's bytes; its record is kept."""
        tensor = self.plan.tensors[name]
        if tensor.operation == "copied":
            assert tensor.source is not None
            found = hash_tensor(tensor.source)
            self._keep(tensor, Survival(), Certified(hash_in=found, hash_out=found))
            return found
        work, digest = self._new_work(tensor), TensorHash(tensor.output.nbytes)
        height = tensor.shape[0] if tensor.shape else 1
        step = self._step(tensor, height)
        row = tensor.output.nbytes // max(1, height)
        blocks = []
        for start in range(0, height if tensor.output.nbytes else 0, step):
            blocks.append(work.compute(start, min(start + step, height)))
            digest.add(start * row, _bytes(blocks[-1]))
            if tensor.output.nbytes > self.keep:
                blocks.clear()
        self._remember(name, blocks)
        found = digest.hexdigest()
        hash_in = hash_parts(self.plan.inputs_of(tensor))
        self._keep(tensor, work.survival, Certified(self._errors(tensor), work.saturated, hash_in, found))
        return found

    def _remember(self, name: str, blocks: "list[torch.Tensor]") -> None:
        import torch

        if not blocks:
            return
        nbytes = self.plan.tensors[name].output.nbytes
        with self._lock:
            if nbytes > self.keep:
                return
            self.keep -= nbytes
        self._kept[name] = torch.cat([b.reshape(-1, *self.plan.tensors[name].shape[1:]) for b in blocks])

    @property
    def records(self) -> list[TensorRecord]:
        """Of the tensors that were hashed, in the order of the output."""
        return [self._records[t.name][0] for s in self.plan.shards for t in s.tensors if t.name in self._records]

    @property
    def survival(self) -> float | None:
        """Of the whole adapter, as far as it was hashed."""
        total = Survival()
        for shard in self.plan.shards:
            for tensor in shard.tensors:
                if tensor.name in self._records:
                    total.join(self._records[tensor.name][1])
        return total.share

    def _rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        tensor = self.plan.tensors[name]
        if tensor.operation == "copied":
            assert tensor.source is not None
            return read_rows(tensor.source, start, stop)
        if name in self._kept:
            return self._kept[name][start:stop]
        if not tensor.row_wise:
            return self._computed_whole(tensor)[start:stop]
        with self._lock:
            work = self._work.setdefault(name, self._new_work(tensor))
        return work.compute(start, stop)

    def _computed_whole(self, tensor: PlannedTensor) -> "torch.Tensor":
        with self._lock:
            if tensor.output.name not in self._whole:
                self._whole.clear()  # the others have been written
                height = tensor.shape[0] if tensor.shape else 1
                self._whole[tensor.output.name] = self._new_work(tensor).compute(0, height)
            return self._whole[tensor.output.name]

    def _new_work(self, tensor: PlannedTensor) -> TensorWork:
        options = self.plan.options
        return TensorWork(tensor, self.plan.base, 1, options.allow_nonfinite, options.device)

    def _step(self, tensor: PlannedTensor, height: int) -> int:
        if not tensor.row_wise or height == 0:
            return max(1, height)
        return max(1, BLOCK * height // max(1, tensor.output.nbytes))

    def _errors(self, tensor: PlannedTensor) -> Errors:
        name, options = tensor.output.name, self.plan.options
        runs = runs_of(tensor.shape, options.certify)
        needed = memory(tensor, runs)
        if needed > options.max_memory:
            self.unchecked[name] = too_large(needed, options.max_memory)
            return Errors()
        errors = ExactTensor(tensor, self.plan.base).compare(
            lambda start, stop: self._rows(name, start, stop), runs
        )
        refuse_beyond(errors, "computed for the export", name)
        return errors

    def _keep(self, tensor: PlannedTensor, survival: Survival, certified: Certified) -> None:
        with self._lock:
            self._records[tensor.output.name] = record(tensor, survival, certified), survival


def write_outline(source: MergedSource) -> list[str]:
    """The merged folder without large numbers: shards with holes, which take no space, and all that lies beside.

    Returns what a person should know of the files beside.
    """
    plan, folder = source.plan, source.folder
    folder.mkdir(exist_ok=True)
    for shard in plan.shards:
        with (folder / shard.file).open("xb") as out:
            out.write(shard.header)
            out.truncate(len(shard.header) + sum(t.nbytes for t in shard.tensors))
            for output in shard.tensors:
                info = source.tensors[output.name]
                if info.nbytes and _count(output.shape) <= SMALL:
                    height = output.shape[0] if output.shape else 1
                    os.pwrite(out.fileno(), _bytes(source._rows(output.name, 0, height)), info.start)
    return write_beside(plan, companion_files(plan.base.folder), folder)


def places(plan: MergePlan, folder: Path) -> dict[str, TensorInfo]:
    found = {}
    for shard in plan.shards:
        at = len(shard.header)
        for t in shard.tensors:
            found[t.name] = TensorInfo(t.name, t.dtype, t.shape, folder / shard.file, at, at + t.nbytes)
            at += t.nbytes
    return found


def _count(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _bytes(values: "torch.Tensor") -> memoryview:
    import torch

    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
