"""The records of a certificate made again from some rows: those of the certificate, and others drawn at random."""

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lora_export.checkpoint.hashing import hash_parts, hash_tensor
from lora_export.contracts import Progress, TensorInfo, Update
from lora_export.merging.certificate.as_recorded import place
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.audit import Auditor
from lora_export.merging.running.exact import Runs, all_runs
from lora_export.merging.running.rows import base_rows, load_updates
from lora_export.merging.running.survival import Survival, stride
from lora_export.merging.running.tensor import saturated


@dataclass
class Recheck:
    """rows: of each computed tensor, drawn with `seed`, so that whoever changes a folder cannot know which.

    audit: keeps the records; beyond: what is not as computed, in words.
    """

    plan: MergePlan
    outputs: Mapping[str, TensorInfo]
    rows: int
    seed: int
    progress: Progress
    audit: Auditor = field(init=False)
    beyond: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.audit = Auditor(self.plan)

    def run(self) -> None:
        names = self.plan.names
        inputs = [self.plan.inputs_of(self.plan.tensors[n]) for n in names]
        with ThreadPoolExecutor(2) as pool:
            for at, (name, hash_in) in enumerate(zip(names, pool.map(hash_parts, inputs), strict=True)):
                self._tensor(self.plan.tensors[name], self.outputs[name], hash_in)
                self.progress.advance(at + 1, len(names))

    def _tensor(self, tensor: PlannedTensor, output: TensorInfo, hash_in: str) -> None:
        if tensor.operation == "copied":
            hash_out = hash_tensor(output)
            if hash_out != hash_in:
                self.beyond.append(f"{place(output)} is not the base's tensor, which is to be copied")
            self.audit.keep(tensor, hash_in=hash_in, hash_out=hash_out)
            return
        if (output.dtype, output.shape) != (tensor.output.dtype, tensor.output.shape):
            self.audit.keep(tensor, hash_in=hash_in)  # the check of the plan reports it
            return
        updates = load_updates(tensor, tensor.wide)
        drawn = self._drawn(output.name, tensor.shape)
        errors, others = self.audit.compare(tensor, output.rows, drawn) if output.nbytes else (None, None)
        worse = errors if errors and errors.beyond else others
        if worse and worse.beyond:
            self.beyond.append(
                f"{place(output)}: {worse.beyond} of {worse.checked} numbers are beyond the bound, the worst by "
                f"{worse.largest:.3g} ulps; the first in row {worse.worst}"
            )
        self.audit.keep(
            tensor,
            survival=measured(tensor, self.plan, updates, output) if updates and output.nbytes else None,
            errors=errors,
            saturated=sum(saturated(output.rows(*run)) for run in all_runs(output.shape)),
            hash_in=hash_in,
            hash_out=hash_tensor(output),
        )

    def _drawn(self, name: str, shape: Sequence[int]) -> Runs:
        height = shape[0] if shape else 1
        rows = random.Random(f"{self.seed} {name}").sample(range(height), min(self.rows, height))
        return tuple((row, row + 1) for row in sorted(rows))


def measured(tensor: PlannedTensor, plan: MergePlan, updates: Sequence[Update], output: TensorInfo) -> Survival:
    """The survival of the written tensor, on the rows that the merge takes."""
    import torch

    packed = tensor.quantized.load(plan.base) if tensor.quantized else None
    height = tensor.height
    step = stride(tensor.shape) if tensor.shape else 1

    def of(runs: Sequence[tuple[int, int]], every: int) -> Survival:
        survival = Survival()
        for start, stop in runs:
            before = base_rows(tensor, packed, start, stop).to(torch.float64 if tensor.wide else torch.float32)
            after = before.clone() if tensor.shape else before.clone().reshape(())
            for update in updates:
                after = update.apply(after, slice(start, stop))
            rows = slice(None, None, every)
            survival.add(before[rows], after.reshape(before.shape)[rows], output.rows(start, stop)[rows])
        return survival

    if not tensor.row_wise:
        some = of([(0, height)], step)
        return some if some.delta != 0 else of([(0, height)], 1)
    some = of(all_runs(tensor.shape) if step == 1 else [(i, i + 1) for i in range(0, height, step)], 1)
    return some if some.delta != 0 or step == 1 else of(all_runs(tensor.shape), 1)
