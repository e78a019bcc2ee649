"""A plan carried out: one tensor, one block of rows at a time, in fp32, rounded once at the write."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.checkpoint.reader import file_dtype, read_rows, torch_dtype
from lora_export.contracts import Progress, TensorRecord, Update
from lora_export.errors import CheckpointError
from lora_export.files import copy_range, write_all
from lora_export.merge.plan import FLOATS, MergePlan, PlannedTensor

if TYPE_CHECKING:
    import torch

MIN_BLOCK = 2**20  # bytes of fp32; smaller blocks cost more in calls than they save in memory
COPIES = 6  # fp32 buffers of a block that are alive at once: read, weight, result, delta, rounded, difference


@dataclass
class Survival:
    """How much of the delta is still there after rounding: ⟨W'−W, Δ⟩ / ⟨Δ, Δ⟩, summed in float64."""

    kept: float = 0.0
    delta: float = 0.0
    weight: float = 0.0

    def add(self, before: "torch.Tensor", after: "torch.Tensor", rounded: "torch.Tensor") -> None:
        import torch

        delta = (after - before).reshape(-1)
        flat = before.reshape(-1)
        square = float(torch.dot(delta, delta))
        self.delta += square
        self.weight += float(torch.dot(flat, flat))
        if rounded.dtype == torch.float32:
            self.kept += square
        else:
            self.kept += float(torch.dot((rounded.to(torch.float32) - before).reshape(-1), delta))

    @property
    def share(self) -> float | None:
        return self.kept / self.delta if self.delta > 0 else None

    @property
    def relative_delta(self) -> float | None:
        return float((self.delta / self.weight) ** 0.5) if self.weight > 0 else None


@dataclass
class Execution:
    """Writes the shards of a plan into a folder and keeps the record of every tensor."""

    plan: MergePlan
    folder: Path
    progress: Progress
    total: Survival = field(default_factory=Survival)
    records: list[TensorRecord] = field(default_factory=list)
    _inputs: dict[Path, int] = field(default_factory=dict)

    def run(self) -> None:
        count, done = len(self.plan.tensors), 0
        with contextlib.ExitStack() as stack:
            for shard in self.plan.shards:
                with (self.folder / shard.file).open("wb", buffering=0) as out:
                    write_all(out.fileno(), shard.header)
                    for output in shard.tensors:
                        self._write(out.fileno(), self.plan.tensors[output.name], stack)
                        done += 1
                        self.progress.advance(done, count)

    def _write(self, out: int, tensor: PlannedTensor, stack: contextlib.ExitStack) -> None:
        survival = Survival()
        if tensor.operation == "copied":
            self._copy(out, tensor, stack)
        else:
            self._compute(out, tensor, survival)
        self.total.kept += survival.kept
        self.total.delta += survival.delta
        self.records.append(
            TensorRecord(
                name=tensor.output.name,
                operation=tensor.operation,
                dtype=tensor.output.dtype,
                shape=tensor.output.shape,
                kinds=tuple(u.kind for u in tensor.updates),
                relative_delta=survival.relative_delta if tensor.updates else None,
                survival=survival.share,
            )
        )

    def _copy(self, out: int, tensor: PlannedTensor, stack: contextlib.ExitStack) -> None:
        info = tensor.source
        assert info is not None
        if info.file not in self._inputs:
            fd = os.open(info.file, os.O_RDONLY)
            stack.callback(os.close, fd)
            self._inputs[info.file] = fd
        copy_range(self._inputs[info.file], info.start, info.nbytes, out)

    def _compute(self, out: int, tensor: PlannedTensor, survival: Survival) -> None:
        import torch

        updates = [u.load(tensor.shape) for u in tensor.updates]
        dtype = torch_dtype(tensor.output.dtype)
        for rows, weight in self._blocks(tensor, updates):
            result = weight
            for update in updates:
                result = update.apply(result, rows)
            rounded = result.to(dtype)
            self._check_finite(tensor, weight, rounded)
            if updates and weight.shape == result.shape:
                survival.add(weight, result, rounded)
            write_all(out, memoryview(rounded.contiguous().reshape(-1).view(torch.uint8).numpy().data))

    def _blocks(self, tensor: PlannedTensor, updates: list[Update]) -> Iterator[tuple[slice, "torch.Tensor"]]:
        """(rows, fp32 weight) blocks, small enough for the memory limit wherever the work goes row by row."""
        import torch

        shape = tensor.shape or (1,)
        info = tensor.source
        assert info is not None
        if info.shape != shape and tensor.quantized is None:  # resized: the old rows do not enter
            yield slice(0, shape[0]), torch.zeros(tensor.shape, dtype=torch.float32)
            return
        whole = tensor.training is not None or not all(u.row_wise for u in updates)
        step = shape[0] if whole else self._rows_per_block(shape)
        packed = tensor.quantized.load(self.plan.base) if tensor.quantized else None
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            if packed is not None:
                block = packed.rows(start, stop)
            elif tensor.training is not None:
                block = tensor.training.round_trip(read_rows(info, start, stop))
            else:
                block = read_rows(info, start, stop).to(torch.float32)
            yield slice(start, stop), block.reshape(tensor.shape) if not tensor.shape else block

    def _rows_per_block(self, shape: tuple[int, ...]) -> int:
        row = 4
        for n in shape[1:]:
            row *= n
        budget = max(MIN_BLOCK, min(self.plan.options.max_memory // (2 * COPIES), 16 * MIN_BLOCK))
        return max(1, budget // max(row, 1))

    def _check_finite(self, tensor: PlannedTensor, weight: "torch.Tensor", rounded: "torch.Tensor") -> None:
        import torch

        if tensor.output.dtype not in FLOATS or bool(torch.isfinite(rounded).all()):
            return
        side = "the merged result" if bool(torch.isfinite(weight).all()) else "the base"
        kind = file_dtype(str(rounded.dtype).removeprefix("torch."))
        raise CheckpointError(
            f"{side} holds NaN or infinity as {kind}",
            where=tensor.source.file if tensor.source and side == "the base" else None,
            tensor=tensor.output.name,
            expected="finite numbers",
            next_step="--dtype bfloat16 or float32 has the range that float16 lacks"
            if kind == "F16"
            else "check this tensor in the base and in the adapter",
        )
