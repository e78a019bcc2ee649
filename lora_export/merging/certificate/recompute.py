"""A merge done once more over a merged folder: every byte that it would write is compared with what is there."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.checkpoint.hashing import hash_tensor
from lora_export.checkpoint.reader import read_rows
from lora_export.contracts import Progress, TensorInfo, TensorRecord
from lora_export.errors import CheckpointError
from lora_export.merging.certificate.as_recorded import place
from lora_export.merging.certificate.compare import Findings
from lora_export.merging.certificate.document import versions
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.blocks import STRETCH, Copy
from lora_export.merging.running.exact import Errors, ExactTensor, all_runs
from lora_export.merging.running.stream import places
from lora_export.merging.running.write import Execution
from lora_export.storage.workers import ComparedFile, OpenFile, read_bytes

if TYPE_CHECKING:
    import numpy as np

    from lora_export.storage.workers import Bytes


@dataclass(frozen=True)
class Recomputed:
    """What the certificate of a merge that was done again says. hashes: of the tensors that agree byte for byte."""

    records: Sequence[TensorRecord]
    survival: float | None
    unchecked: Mapping[str, str]
    hashes: Mapping[str, str]


def recompute(
    findings: Findings, planned: MergePlan, folder: Path, recorded: Mapping[str, Any], progress: Progress
) -> Recomputed:
    """Merge again and compare. LoraExportError if base and adapters cannot be merged.

    Where torch and processor are those of the certificate every byte must be the same. Others add up in another
    order, which may turn a rounding: a number that differs must then be within the bound of float64, and what was
    taken so is named.
    """
    again = Recomputation(planned, folder, progress)
    again.run()
    failures, within = [], dict[str, Difference]()
    away = elsewhere(recorded, planned)
    for name, difference in again.different.items():
        tensor = planned.tensors[name]
        beyond = away is None or tensor.operation in ("copied", "converted") or _beyond(tensor, planned, difference)
        if beyond:
            failures.append(difference.words)
        else:
            within[name] = difference
    findings.judge("arithmetic", f"every byte of {len(planned.tensors)} tensors is what the merge writes", failures)
    if within:
        rows = sum(int(d.rows.sum()) for d in within.values())
        findings.not_checked.append(
            f"the last bits of {rows} rows in {len(within)} tensors: {away}; they are within float64's bound"
        )
    found = [
        replace(r, hash_out=hash_tensor(within[r.name].info)) if r.name in within else r for r in again.records
    ]
    known = {r.name: r.hash_out for r in found if r.hash_out and r.name not in again.different}
    return Recomputed(found, again.survival, again.unchecked, known)


def elsewhere(recorded: Mapping[str, Any], planned: MergePlan) -> str | None:
    """Where the merge was done, if its bits may differ from those that are computed here."""
    here, there = ({"torch": "?", "processor": "?", **v} for v in (versions(planned), recorded["versions"]))
    if recorded["options"]["device"] == "cpu" and all(here[k] == there[k] for k in ("torch", "processor")):
        return None
    device = recorded["options"]["device"]
    return (
        f"the merge was done by torch {there['torch']} on {there['processor']} ({device}), here is torch "
        f"{here['torch']} on {here['processor']}"
    )


def _beyond(tensor: PlannedTensor, planned: MergePlan, difference: "Difference") -> bool:
    exact = ExactTensor(tensor, planned.base)
    return exact.compare(partial(read_rows, difference.info), all_runs(tensor.shape)).beyond > 0


@dataclass
class Difference:
    """The rows of a tensor of which a byte is not what the merge writes."""

    info: TensorInfo
    rows: "np.ndarray[Any, Any]"

    @property
    def words(self) -> str:
        """Where, and how much of it."""
        found = self.rows.nonzero()[0]
        which = f"{len(found)} of {len(self.rows)} rows are not what the merge writes; the first is row {found[0]}"
        return f"{place(self.info)}: {which}"


@dataclass
class Recomputation(Execution):
    """folder: a merged folder with the planned files, of the planned sizes; it is only read.

    different: of each tensor that is not what the merge writes. The records, `unchecked` and the survival are those
    of a fresh merge: hash_out is of the bytes that belong there.
    """

    different: dict[str, Difference] = field(default_factory=dict)
    _starts: dict[Path, list[tuple[int, TensorInfo]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for info in places(self.plan, self.folder).values():
            if info.nbytes:
                self._starts.setdefault(info.file, []).append((info.start, info))

    def _output(self, path: Path) -> OpenFile:
        def tell(at: int, wanted: "Bytes", found: "Bytes") -> None:
            self._differs(path, at, wanted, found)

        return ComparedFile(path, os.open(path, os.O_RDONLY), told=tell)

    def _judge(self, errors: Errors, output: TensorInfo) -> None:
        """Whatever is beyond the bound of float64 differs in its bytes as well."""

    def _copies(self, tensor: PlannedTensor, source: OpenFile, out: OpenFile, at: int) -> Iterator[Copy]:
        for job in super()._copies(tensor, source, out, at):
            yield _Compared(**vars(job))

    def _differs(self, path: Path, at: int, wanted: "Bytes", found: "Bytes") -> None:
        import numpy as np

        starts = self._starts[path]
        index = bisect_right(starts, at, key=lambda one: one[0]) - 1
        if index < 0:
            return  # the header, which is compared by its hash
        info = starts[index][1]
        height = info.shape[0] if info.shape else 1
        unlike = np.ones(len(wanted), bool)
        unlike[: len(found)] = wanted[: len(found)] != found
        rows = (unlike.nonzero()[0] + at - info.start) // (info.nbytes // height)
        with self._keeping:
            known = self.different.setdefault(info.name, Difference(info, np.zeros(height, bool)))
            known.rows[rows] = True


@dataclass(frozen=True)
class _Compared(Copy):
    """Bytes that a merge copies, compared and hashed as they are read."""

    def run(self) -> int:
        for done in range(0, self.length, STRETCH):
            data = read_bytes(self.source, self.start + done, min(STRETCH, self.length - done))
            if len(data) < min(STRETCH, self.length - done):
                raise CheckpointError("the file ended early", where=self.source.path, tensor=self.name)
            self.out.write(data.data, self.at + done)
            if self.pieces.hash is not None:
                self.pieces.hash.add(self.start + done - self.pieces.start, data.data)
        return self.length
