"""A merge done once more over a merged folder: every byte that it would write is compared with what is there."""

import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.checkpoint.hashing import hash_tensor
from lora_export.checkpoint.tensor_files import FILES
from lora_export.contracts import Findings, Progress, TensorInfo
from lora_export.merging.certificate.as_recorded import place
from lora_export.merging.certificate.document import Certificate, versions
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.running.audit import Auditor
from lora_export.merging.running.exact import ExactTensor, all_runs
from lora_export.merging.running.layout import places, write_shards
from lora_export.storage.workers import ComparedFile, Regions

if TYPE_CHECKING:
    import numpy as np

    from lora_export.storage.workers import Bytes


def recompute(
    findings: Findings, planned: MergePlan, folder: Path, recorded: Certificate, progress: Progress
) -> tuple[Auditor, dict[str, str]]:
    """Merge again and compare: what the merge says, and the hashes of the tensors that agree byte for byte.

    LoraExportError if base and adapters cannot be merged.

    Where torch and processor are those of the certificate every byte must be the same. Others add up in another
    order, which may turn a rounding: a number that differs must then be within the bound of float64, and what was
    taken so is named.
    """
    again = Recomputation(planned, folder)
    audit = again.run(progress)
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
    for name, difference in within.items():
        audit.amend(name, hash_out=hash_tensor(difference.info))
    return audit, {r.name: r.hash_out for r in audit.records if r.hash_out and r.name not in again.different}


def elsewhere(recorded: Certificate, planned: MergePlan) -> str | None:
    """Where the merge was done, if its bits may differ from those that are computed here."""
    here, there = ({"torch": "?", "processor": "?", **v} for v in (versions(planned), recorded.versions))
    device = recorded.options.device
    if device == "cpu" and all(here[k] == there[k] for k in ("torch", "processor")):
        return None
    return (
        f"the merge was done by torch {there['torch']} on {there['processor']} ({device}), here is torch "
        f"{here['torch']} on {here['processor']}"
    )


def _beyond(tensor: PlannedTensor, planned: MergePlan, difference: "Difference") -> bool:
    exact = ExactTensor(tensor, planned.base)
    return exact.compare(difference.info.rows, all_runs(tensor.shape)).beyond > 0


@dataclass
class Difference:
    """The rows of a tensor that differ from what the merge writes."""

    info: TensorInfo
    rows: "np.ndarray[Any, Any]"

    @property
    def words(self) -> str:
        """Where, and how much of it."""
        differing = self.rows.nonzero()[0]
        wrong = f"{len(differing)} of {len(self.rows)} rows are not what the merge writes"
        return f"{place(self.info)}: {wrong}; the first is row {differing[0]}"


@dataclass
class Recomputation:
    """folder: a merged folder with the planned files, of the planned sizes; it is only read.

    different: of each tensor that is not what the merge writes. The auditor's records are those of a fresh merge:
    hash_out is of the bytes that belong there.
    """

    plan: MergePlan
    folder: Path
    different: dict[str, Difference] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, progress: Progress) -> Auditor:
        there = places(self.plan, self.folder, FILES).values()
        regions = Regions((t.file.name, t.start, t) for t in there if t.nbytes)

        def compared(path: Path) -> ComparedFile:
            return ComparedFile.compare(path, partial(self._differs, regions, path.name))

        # Whatever is beyond the bound of float64 differs in its bytes as well.
        return write_shards(self.plan, self.folder, progress, Auditor(self.plan, refuses=False), compared)

    def _differs(self, regions: Regions[TensorInfo], file: str, at: int, wanted: "Bytes", there: "Bytes") -> None:
        import numpy as np

        info = regions.at(file, at)
        if info is None:
            return  # the header, which is compared by its hash
        unlike = np.ones(len(wanted), bool)
        unlike[: len(there)] = wanted[: len(there)] != there
        rows = (unlike.nonzero()[0] + at - info.start) // info.row_nbytes
        with self._lock:
            known = self.different.setdefault(info.name, Difference(info, np.zeros(info.height, bool)))
            known.rows[rows] = True
