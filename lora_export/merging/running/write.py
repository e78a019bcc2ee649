"""A plan carried out by as many threads as there are cores: read, computed and written at planned offsets.

Every thread takes the next job: bytes to copy, or a block of rows to compute. The jobs that are in work at a time
stay within the memory limit together.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lora_export.checkpoint.hashing import TensorHash, hash_parts
from lora_export.checkpoint.reader import read_rows
from lora_export.contracts import Progress, TensorInfo, TensorRecord
from lora_export.errors import InputError
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.blocks import Block, Copy, Pieces
from lora_export.merging.running.exact import Errors, ExactTensor, memory, refuse_beyond, runs_of, too_large
from lora_export.merging.running.survival import Survival
from lora_export.merging.running.tensor import Certified, TensorWork, record
from lora_export.storage.workers import BLOCK, Budget, OpenFile, cores, reuse_memory, share_out

PIECE = 2**24  # bytes that are copied by a thread before it takes something else
_SMALLER = 4  # times smaller is a block of which several deltas are in memory, in float64


@dataclass
class Execution:
    """Writes the shards of a plan into a folder and keeps the record of every tensor.

    certified: whether tensors are hashed and computed again in float64; unchecked: tensors that were not computed
    again → why.
    """

    plan: MergePlan
    folder: Path
    progress: Progress
    certified: bool = True
    workers: int = field(default_factory=cores)
    unchecked: dict[str, str] = field(default_factory=dict)
    _records: dict[str, TensorRecord] = field(default_factory=dict)
    _survival: dict[str, Survival] = field(default_factory=dict)
    _outputs: dict[str, TensorInfo] = field(default_factory=dict)
    _taking: threading.Lock = field(default_factory=threading.Lock)
    _keeping: threading.Lock = field(default_factory=threading.Lock)
    _written: int = 0

    def run(self) -> None:
        """InputError before the first byte if a single block needs more memory than is allowed."""
        computed = [t for t in self.plan.tensors.values() if t.operation != "copied"]
        for tensor in computed:
            self._check_memory(tensor)
        with contextlib.ExitStack() as files, one_thread_each(self.plan.computes):
            self._share_out(self._jobs(files))

    @property
    def records(self) -> list[TensorRecord]:
        return [self._records[t.name] for shard in self.plan.shards for t in shard.tensors]

    @property
    def survival(self) -> float | None:
        """Of the whole adapter, summed in the order of the output."""
        total = Survival()
        for shard in self.plan.shards:
            for tensor in shard.tensors:
                total.join(self._survival[tensor.name])
        return total.share

    def _share_out(self, jobs: Iterator[Copy | Block]) -> None:
        budget = Budget(self.plan.options.max_memory)
        total = sum(t.output.nbytes for t in self.plan.tensors.values())

        def look() -> None:
            self.progress.advance(self._written, total)

        share_out(lambda: self._take(jobs, budget), self.workers, look)

    def _take(self, jobs: Iterator[Copy | Block], budget: Budget) -> bool:
        with self._taking:
            job = next(jobs, None)
        if job is None:
            return False
        with budget.holding(job.cost):
            written = job.run()
        if isinstance(job, Block):
            if job.work.finished():
                self._complete(job.work, budget)
        else:
            self._copied(job.pieces)
        with self._taking:
            self._written += written
        return True

    def _copied(self, pieces: Pieces) -> None:
        with self._keeping:
            pieces.left -= 1
            if pieces.left > 0:
                return
        found = pieces.hash.hexdigest() if pieces.hash else None
        self._keep(pieces.tensor, Survival(), Certified(hash_in=found, hash_out=found))

    def _complete(self, work: TensorWork, budget: Budget) -> None:
        """Certify a tensor whose last block was written. CheckpointError if it is not what float64 gives."""
        if not self.certified:
            self._keep(work.tensor, work.survival, Certified(saturated=work.saturated))
            return
        errors = self._check(work, budget)
        hash_in = work.hash_in.hexdigest() if work.hash_in else hash_parts(self.plan.inputs_of(work.tensor))
        hash_out = work.hash_out.hexdigest() if work.hash_out else None
        self._keep(work.tensor, work.survival, Certified(errors, work.saturated, hash_in, hash_out))

    def _check(self, work: TensorWork, budget: Budget) -> Errors:
        tensor, options = work.tensor, self.plan.options
        runs = runs_of(tensor.shape, options.certify)
        needed = memory(tensor, runs)
        if needed > options.max_memory:
            self.unchecked[tensor.output.name] = too_large(needed, options.max_memory)
            return Errors()
        with budget.holding(needed):
            output = self._outputs[tensor.output.name]
            errors = ExactTensor(tensor, self.plan.base).compare(partial(read_rows, output), runs)
        self._judge(errors, output)
        return errors

    def _judge(self, errors: Errors, output: TensorInfo) -> None:
        refuse_beyond(errors, output.file.name, output.name)

    def _keep(self, tensor: PlannedTensor, survival: Survival, certified: Certified) -> None:
        with self._keeping:
            self._survival[tensor.output.name] = survival
            self._records[tensor.output.name] = record(tensor, survival, certified)

    def _jobs(self, files: contextlib.ExitStack) -> Iterator[Copy | Block]:
        """Every byte of the output once, in the order of the files. Runs under the lock of `_take`."""
        inputs: dict[Path, OpenFile] = {}

        def closed_later(file: OpenFile) -> OpenFile:
            files.callback(os.close, file.fd)
            return file

        for shard in self.plan.shards:
            out = closed_later(self._output(self.folder / shard.file))
            out.write(shard.header, 0)
            at = len(shard.header)
            for output in shard.tensors:
                tensor = self.plan.tensors[output.name]
                self._outputs[output.name] = TensorInfo(
                    output.name, output.dtype, output.shape, out.path, at, at + output.nbytes
                )
                if tensor.operation == "copied":
                    assert tensor.source is not None
                    file = tensor.source.file
                    if file not in inputs:
                        inputs[file] = closed_later(OpenFile(file, os.open(file, os.O_RDONLY)))
                    yield from self._copies(tensor, inputs[file], out, at)
                else:
                    yield from self._blocks(tensor, out, at)
                at += output.nbytes

    def _output(self, path: Path) -> OpenFile:
        return OpenFile(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))

    def _copies(self, tensor: PlannedTensor, source: OpenFile, out: OpenFile, at: int) -> Iterator[Copy]:
        info = tensor.source
        assert info is not None
        pieces = Pieces(tensor, info.start, -(-info.nbytes // PIECE), self._hash(info.nbytes))
        if not info.nbytes:
            self._copied(pieces)
        for done in range(0, info.nbytes, PIECE):
            length = min(PIECE, info.nbytes - done)
            yield Copy(info.name, source, info.start + done, length, out, at + done, pieces)

    def _blocks(self, tensor: PlannedTensor, out: OpenFile, at: int) -> Iterator[Block]:
        height, rows = _height(tensor), self._rows(tensor)
        options, info = self.plan.options, tensor.source
        blocks = -(-height // rows) if tensor.output.nbytes else 0
        work = TensorWork(tensor, self.plan.base, blocks, options.allow_nonfinite, options.device)
        work.hash_out = self._hash(tensor.output.nbytes)
        if tensor.quantized is None and info is not None and info.shape == tensor.shape:  # read as a whole
            work.hash_in = self._hash(info.nbytes)
        if not blocks:
            found = work.hash_out.hexdigest() if work.hash_out else None
            self._keep(tensor, Survival(), Certified(hash_in=found, hash_out=found))
            return
        row = tensor.output.nbytes // height
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            yield Block(work, start, stop, out, at + start * row, self._cost(tensor, stop - start))

    def _hash(self, nbytes: int) -> TensorHash | None:
        return TensorHash(nbytes) if self.certified else None

    def _rows(self, tensor: PlannedTensor) -> int:
        """Rows of a block: all of them where the result of one depends on others."""
        if not tensor.row_wise:
            return max(1, _height(tensor))
        block = BLOCK // _SMALLER if any(u.wide for u in tensor.updates) else BLOCK
        limit = min(block, self.plan.options.max_memory // (self.workers * tensor.copies))
        return max(1, limit // max(1, _row(tensor)))

    def _cost(self, tensor: PlannedTensor, rows: int) -> int:
        kept = tensor.quantized.kept if tensor.quantized else ()
        packed = sum(self.plan.base.tensors[p].nbytes for p in kept)
        return rows * _row(tensor) * tensor.copies + packed

    def _check_memory(self, tensor: PlannedTensor) -> None:
        needed = self._cost(tensor, self._rows(tensor))
        if needed > self.plan.options.max_memory:
            raise InputError(
                f"merging this tensor takes {needed / 2**20:.0f} MiB, --max-memory allows "
                f"{self.plan.options.max_memory / 2**20:.0f} MiB",
                tensor=tensor.output.name,
                expected="room for what cannot be done in smaller pieces",
                next_step=f"--max-memory {-(-needed // 2**20)}MiB",
            )


def _height(tensor: PlannedTensor) -> int:
    return tensor.shape[0] if tensor.shape else 1


def _row(tensor: PlannedTensor) -> int:
    """Bytes of a row in fp32."""
    size = 4
    for n in tensor.shape[1:]:
        size *= n
    return size


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
