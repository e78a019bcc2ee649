"""The auditor: what a certificate says of each tensor, whichever way the tensor went, and the check in float64."""

import threading
from dataclasses import dataclass, field, replace

from lora_export.checkpoint.adapter_files import adapter_hashes
from lora_export.contracts import TensorRecord
from lora_export.errors import CheckpointError
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.exact import Errors, ExactTensor, Runs, memory, runs_of
from lora_export.merging.running.rows import Reader
from lora_export.merging.running.survival import Survival
from lora_export.storage.workers import Budget


@dataclass
class Auditor:
    """certified: whether tensors are hashed and computed again in float64; refuses: whether a number beyond the
    bound of float64 is an error (not where every byte is compared anyway); unchecked: tensors that were not
    computed again → why.
    """

    plan: MergePlan
    certified: bool = True
    refuses: bool = True
    unchecked: dict[str, str] = field(default_factory=dict)
    budget: Budget = field(init=False)
    _kept: dict[str, tuple[TensorRecord, Survival]] = field(default_factory=dict)
    _adapter_hashes: list[dict[str, str]] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.budget = Budget(self.plan.options.max_memory)

    @property
    def records(self) -> list[TensorRecord]:
        """Of the tensors that were looked at, in the order of the output."""
        return [self._kept[n][0] for n in self.plan.names if n in self._kept]

    @property
    def survival(self) -> float | None:
        """Of the whole adapter, as far as it was looked at, summed in the order of the output."""
        total = Survival()
        for name in self.plan.names:
            if name in self._kept:
                total.join(self._kept[name][1])
        return total.share

    @property
    def adapter_hashes(self) -> list[dict[str, str]]:
        """SHA-256 of the files of each adapter, by name."""
        if self._adapter_hashes is None:
            self.hash_adapters()
        assert self._adapter_hashes is not None
        return self._adapter_hashes

    def hash_adapters(self) -> int:
        """A job that writes no bytes: the hashes, while other threads compute."""
        adapters = self.plan.adapters
        self._adapter_hashes = [adapter_hashes(a.folder, {t.file for t in a.tensors.values()}) for a in adapters]
        return 0

    def record(self, name: str) -> TensorRecord | None:
        return self._kept[name][0] if name in self._kept else None

    def keep(
        self,
        tensor: PlannedTensor,
        *,
        survival: Survival | None = None,
        errors: Errors | None = None,
        saturated: int = 0,
        hash_in: str | None = None,
        hash_out: str | None = None,
    ) -> None:
        """Keep what happened to a tensor. The hashes are those of hashing.py."""
        survival, errors = survival or Survival(), errors or Errors()
        record = TensorRecord(
            name=tensor.output.name,
            operation=tensor.operation,
            dtype=tensor.output.dtype,
            shape=tensor.output.shape,
            kinds=tuple(u.kind for u in tensor.updates),
            relative_delta=survival.relative_delta if tensor.updates else None,
            survival=survival.share,
            max_ulps=errors.largest if errors.checked else None,
            mean_ulps=errors.mean if errors.checked else None,
            checked=errors.checked,
            saturated=saturated,
            hash_in=hash_in,
            hash_out=hash_out,
        )
        with self._lock:
            self._kept[record.name] = record, survival

    def amend(self, name: str, hash_out: str) -> None:
        """Another hash in the record of a tensor."""
        record, survival = self._kept[name]
        self._kept[name] = replace(record, hash_out=hash_out), survival

    def compare(self, tensor: PlannedTensor, written: Reader, also: Runs = ()) -> tuple[Errors, Errors]:
        """How far a tensor is from float64: on the rows that a certificate speaks of, and on those of `also`.

        written: reads rows of it. Nothing is checked, and `unchecked` says so, where --max-memory is too small.
        """
        runs, allowed = runs_of(tensor.shape, self.plan.options.certify), self.plan.options.max_memory
        needed = memory(tensor, runs)
        if needed > allowed:
            self.unchecked[tensor.output.name] = (
                f"float64 takes {needed / 2**20:.1f} MiB for it, --max-memory allows {allowed / 2**20:.1f} MiB"
            )
            return Errors(), Errors()
        with self.budget.holding(needed):
            exact = ExactTensor(tensor, self.plan.base)
            return exact.compare(written, runs), exact.compare(written, also) if also else Errors()

    def judge(self, tensor: PlannedTensor, written: Reader, where: str) -> Errors:
        """`compare`; CheckpointError if a number is beyond the bound. where: what it was read from."""
        errors, _ = self.compare(tensor, written)
        if errors.beyond and self.refuses:
            raise CheckpointError(
                f"{errors.beyond} of {errors.checked} numbers that were computed again in float64 are beyond the "
                f"bound of the arithmetic; the worst is {errors.largest:.3g} units in the last place off",
                where=where,
                tensor=f"{tensor.output.name}, row {errors.worst}",
                expected="½ unit, and what fp32 may lose before",
                next_step="merge again; if it comes back, report it: processor, memory or a library is at fault",
            )
        return errors
