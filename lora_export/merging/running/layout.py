"""The layout of a merge: which bytes of the shards are copied, and which rows are computed into them."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path

from lora_export.checkpoint.hashing import TensorHash, hash_parts
from lora_export.checkpoint.tensor_files import FILES
from lora_export.contracts import ByteSink, Progress, TensorInfo, TensorSource
from lora_export.errors import InputError
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.audit import Auditor
from lora_export.merging.running.tensor import TensorWork
from lora_export.storage.workers import BLOCK, Job, OpenFile, carry_out, copies, cores, reuse_memory

_SMALLER = 4  # times smaller is a block of which several deltas are in memory, in float64


def write_shards(
    plan: MergePlan,
    folder: Path,
    progress: Progress,
    audit: Auditor | None = None,
    opened: Callable[[Path], OpenFile] = OpenFile.create,
    workers: int | None = None,
    also: Sequence[Job] = (),
) -> Auditor:
    """Put every byte of a plan's shards into a folder, on all cores, and return what was found out about them.

    opened: the sink for a shard; also: jobs that are done meanwhile. InputError before the first byte if a single
    block needs more memory than is allowed.
    """
    audit, workers = audit or Auditor(plan), workers or cores()
    _check_memory(plan, workers)
    total = sum(t.output.nbytes for t in plan.tensors.values())
    with contextlib.ExitStack() as files, one_thread_each(plan.computes):
        jobs = _jobs(audit, folder, lambda path: files.enter_context(contextlib.closing(opened(path))), workers)
        carry_out(chain(also, jobs), audit.budget, workers, lambda written: progress.advance(written, total))
    return audit


def _jobs(audit: Auditor, folder: Path, opened: Callable[[Path], OpenFile], workers: int) -> Iterator[Job]:
    """Every byte of the output once, in the order of the files."""
    plan, there = audit.plan, places(audit.plan, folder, FILES)
    for shard in plan.shards:
        out = opened(folder / shard.file)
        out.write(shard.header, 0)
        for output in shard.tensors:
            yield from TensorPass(audit, plan.tensors[output.name], out, there[output.name], workers).jobs()


def places(plan: MergePlan, folder: Path, source: TensorSource) -> dict[str, TensorInfo]:
    """The tensors of a plan's output by name, as they lie in its shards in `folder`. source: gives their bytes."""
    placed = {}
    for shard in plan.shards:
        at = len(shard.header)
        for t in shard.tensors:
            placed[t.name] = TensorInfo(t.name, t.dtype, t.shape, folder / shard.file, at, at + t.nbytes, source)
            at += t.nbytes
    return placed


@dataclass
class TensorPass:
    """One tensor on its way into a sink: its jobs, and its record when the last of them is done.

    place: where it lies in the sink, and what reads it there for the check in float64.
    """

    audit: Auditor
    tensor: PlannedTensor
    out: ByteSink
    place: TensorInfo
    workers: int = 1
    _left: int = 0
    _work: TensorWork | None = None
    _hash_in: TensorHash | None = None
    _hash_out: TensorHash | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def jobs(self) -> Iterator[Job]:
        self._hash_out = TensorHash(self.tensor.output.nbytes) if self.audit.certified else None
        jobs = list(self._copies() if self.tensor.operation == "copied" else self._blocks())
        self._left = len(jobs) or 1
        if not jobs:
            self._done()
        yield from jobs

    def _copies(self) -> Iterator[Job]:
        assert self.tensor.source is not None
        seen = self._hash_out.add if self._hash_out else None
        return copies(self.tensor.source, self.out, self.place.start, seen, self._done)

    def _blocks(self) -> Iterator[Job]:
        tensor, plan, info = self.tensor, self.audit.plan, self.tensor.source
        hashed = None
        if self.audit.certified and tensor.quantized is None and info is not None and info.shape == tensor.shape:
            self._hash_in = TensorHash(info.nbytes)  # of a tensor that is read as a whole
            hashed = self._hash_in.add
        self._work = TensorWork(tensor, plan.base, plan.options.allow_nonfinite, plan.options.device, hashed)
        rows, cost = _block(plan, tensor, self.workers)
        for start in range(0, tensor.height if tensor.output.nbytes else 0, rows):
            yield Job(partial(self._compute, start, min(start + rows, tensor.height)), cost, self._done)

    def _compute(self, start: int, stop: int) -> int:
        import torch

        assert self._work is not None
        data = memoryview(self._work.compute(start, stop).reshape(-1).view(torch.uint8).numpy().data)
        if self._hash_out is not None:
            self._hash_out.add(start * self.place.row_nbytes, data)
        self.out.write(data, self.place.start + start * self.place.row_nbytes)
        return len(data)

    def _done(self) -> None:
        """After each job. CheckpointError after the last one if the tensor is not what float64 gives."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
        hash_out = self._hash_out.hexdigest() if self._hash_out else None
        work, tensor = self._work, self.tensor
        if work is None or not tensor.output.nbytes:
            self.audit.keep(tensor, hash_in=hash_out, hash_out=hash_out)
        elif hash_out is None:
            self.audit.keep(tensor, survival=work.survival, saturated=work.saturated)
        else:
            errors = self.audit.judge(tensor, self.place.rows, self.place.file.name)
            hash_in = self._hash_in.hexdigest() if self._hash_in else hash_parts(self.audit.plan.inputs_of(tensor))
            self.audit.keep(
                tensor, survival=work.survival, errors=errors, saturated=work.saturated,
                hash_in=hash_in, hash_out=hash_out,
            )  # fmt: skip


def _block(plan: MergePlan, tensor: PlannedTensor, workers: int) -> tuple[int, int]:
    """Rows of a block, and the memory that one takes. All rows where the result of one depends on others."""
    row = 4 * prod(tensor.shape[1:])  # bytes in fp32
    block = BLOCK // _SMALLER if any(u.wide and u.parts for u in tensor.updates) else BLOCK
    limit = min(block, plan.options.max_memory // (workers * tensor.copies))
    rows = max(1, limit // max(1, row)) if tensor.row_wise else max(1, tensor.height)
    kept = getattr(tensor.quantized, "kept", tensor.quantized.parts) if tensor.quantized else ()
    return rows, rows * row * tensor.copies + sum(plan.base.tensors[p].nbytes for p in kept)


def _check_memory(plan: MergePlan, workers: int) -> None:
    """InputError if a single block needs more memory than is allowed."""
    allowed = plan.options.max_memory
    for tensor in (t for t in plan.tensors.values() if t.operation != "copied"):
        needed = _block(plan, tensor, workers)[1]
        if needed > allowed:
            raise InputError(
                f"merging this tensor takes {needed / 2**20:.0f} MiB, --max-memory allows "
                f"{allowed / 2**20:.0f} MiB",
                tensor=tensor.output.name,
                expected="room for what cannot be done in smaller pieces",
                next_step=f"--max-memory {-(-needed // 2**20)}MiB",
            )


@contextlib.contextmanager
def one_thread_each(computing: bool = True) -> Iterator[None]:
    """The threads share out blocks; within a block, torch would only get in their way."""
    if not computing:
        yield
        return
    import torch

    reuse_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
