"""The records of a certificate made again from some rows: those of the certificate, and others drawn at random."""

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from lora_export.checkpoint.hashing import hash_parts, hash_tensor
from lora_export.checkpoint.reader import read_rows
from lora_export.contracts import Progress, TensorInfo, TensorRecord, Update
from lora_export.merging.certificate.as_recorded import place
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.base_rows import base_rows
from lora_export.merging.running.exact import (
    Errors,
    ExactTensor,
    Runs,
    all_runs,
    load_updates,
    memory,
    runs_of,
    too_large,
)
from lora_export.merging.running.survival import Survival, stride
from lora_export.merging.running.tensor import Certified, record, saturated


@dataclass
class Recheck:
    """rows: of each computed tensor, drawn with `seed`, so that whoever changes a folder cannot know which.

    records: in the order of the output; beyond: what is not as computed, in words; unchecked: tensor → why.
    """

    plan: MergePlan
    outputs: Mapping[str, TensorInfo]
    rows: int
    seed: int
    progress: Progress
    records: list[TensorRecord] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)
    beyond: list[str] = field(default_factory=list)
    _total: Survival = field(default_factory=Survival)

    @property
    def survival(self) -> float | None:
        return self._total.share

    def run(self) -> None:
        names = [t.name for s in self.plan.shards for t in s.tensors]
        inputs = [self.plan.inputs_of(self.plan.tensors[n]) for n in names]
        with ThreadPoolExecutor(2) as pool:
            for at, (name, hash_in) in enumerate(zip(names, pool.map(hash_parts, inputs), strict=True)):
                self._tensor(self.plan.tensors[name], self.outputs[name], hash_in)
                self.progress.advance(at + 1, len(names))

    def _tensor(self, tensor: PlannedTensor, output: TensorInfo, hash_in: str) -> None:
        if tensor.operation == "copied":
            same = hash_tensor(output)
            if same != hash_in:
                self.beyond.append(f"{place(output)} is not the base's tensor, which is to be copied")
            self.records.append(record(tensor, Survival(), Certified(hash_in=hash_in, hash_out=same)))
            return
        if (output.dtype, output.shape) != (tensor.output.dtype, tensor.output.shape):
            self.records.append(record(tensor, Survival(), Certified(hash_in=hash_in)))  # the plan's check tells it
            return
        updates = load_updates(tensor, tensor.wide)
        errors = self._errors(tensor, output) if output.nbytes else Errors()
        survival = measured(tensor, self.plan, updates, output) if updates and output.nbytes else Survival()
        self._total.join(survival)
        count = sum(saturated(read_rows(output, *run)) for run in all_runs(output.shape))
        self.records.append(record(tensor, survival, Certified(errors, count, hash_in, hash_tensor(output))))

    def _errors(self, tensor: PlannedTensor, output: TensorInfo) -> Errors:
        """Of the rows that the certificate speaks of; those that are drawn must be within the bound as well."""
        limit, name = self.plan.options.max_memory, tensor.output.name
        runs = runs_of(tensor.shape, self.plan.options.certify)
        needed = memory(tensor, runs)
        if needed > limit:
            self.unchecked[name] = too_large(needed, limit)
            return Errors()
        exact = ExactTensor(tensor, self.plan.base)
        errors = exact.compare(partial(read_rows, output), runs)
        drawn = exact.compare(partial(read_rows, output), self._drawn(name, tensor.shape))
        judged = errors if errors.beyond else drawn
        if judged.beyond:
            self.beyond.append(
                f"{place(output)}: {judged.beyond} of {judged.checked} numbers are beyond the bound, the worst by "
                f"{judged.largest:.3g} ulps; the first in row {judged.worst}"
            )
        return errors

    def _drawn(self, name: str, shape: Sequence[int]) -> Runs:
        height = shape[0] if shape else 1
        rows = random.Random(f"{self.seed} {name}").sample(range(height), min(self.rows, height))
        return tuple((row, row + 1) for row in sorted(rows))


def measured(tensor: PlannedTensor, plan: MergePlan, updates: Sequence[Update], output: TensorInfo) -> Survival:
    """The survival of the written tensor, on the rows that the merge takes."""
    import torch

    packed = tensor.quantized.load(plan.base) if tensor.quantized else None
    height = tensor.shape[0] if tensor.shape else 1
    step = stride(tensor.shape) if tensor.shape else 1

    def of(runs: Sequence[tuple[int, int]], every: int) -> Survival:
        found = Survival()
        for start, stop in runs:
            before = base_rows(tensor, packed, start, stop).to(torch.float64 if tensor.wide else torch.float32)
            after = before.clone() if tensor.shape else before.clone().reshape(())
            for update in updates:
                after = update.apply(after, slice(start, stop))
            rows = slice(None, None, every)
            found.add(before[rows], after.reshape(before.shape)[rows], read_rows(output, start, stop)[rows])
        return found

    if not tensor.row_wise:
        some = of([(0, height)], step)
        return some if some.delta != 0 else of([(0, height)], 1)
    some = of(all_runs(tensor.shape) if step == 1 else [(i, i + 1) for i in range(0, height, step)], 1)
    return some if some.delta != 0 or step == 1 else of(all_runs(tensor.shape), 1)
