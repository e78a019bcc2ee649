"""Some tensors of a merged folder written anew, and the certificate that a fresh merge would have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.checkpoint.companions import companion_files
from lora_export.contracts import Progress, TensorRecord
from lora_export.errors import CheckpointError
from lora_export.merging.beside import write_beside
from lora_export.merging.certify import write_certificate
from lora_export.merging.execute import Execution
from lora_export.merging.plan import MergePlan
from lora_export.merging.right_base import base_checks
from lora_export.merging.survival import Survival


@dataclass
class Rewriting:
    """plan: of the new state; names: its tensors that are to be written; earlier, unchecked: what the certificate
    of the files that are written into says of each tensor, which still holds for all others."""

    plan: MergePlan
    names: set[str]
    earlier: Sequence[TensorRecord]
    unchecked: Mapping[str, str]

    def ranges(self) -> dict[str, list[tuple[int, int]]]:
        """File → (offset, length) of what will be written; files in which nothing is are not named."""
        found: dict[str, list[tuple[int, int]]] = {}
        for shard in self.plan.shards:
            at = len(shard.header)
            for output in shard.tensors:
                if output.name in self.names:
                    found.setdefault(shard.file, []).append((at, output.nbytes))
                at += output.nbytes
        return found

    def write(self, folder: Path, weights: Sequence[float], progress: Progress) -> None:
        """Fill in the ranges, write the files beside the shards, and last the certificate.

        CheckpointError if a tensor of the base is not the one that the old state was made of.
        """
        execution = Execution(self.plan, folder, progress, only=frozenset(self.names))
        hashes = {r.name: r.hash_in for r in self.earlier}
        execution.unchecked |= {n: why for n, why in self.unchecked.items() if n not in self.names}
        for old in self.earlier:
            if old.name not in self.names:
                execution.keep(self.plan.tensors[old.name], Survival(), old)
        execution.run()
        for new in execution.records:
            if hashes.get(new.name) not in (None, new.hash_in):
                raise CheckpointError(
                    "this tensor of the base is not the one that the folder was merged from",
                    where=self.plan.base.folder,
                    tensor=new.name,
                    expected="the same base",
                    next_step="give that base as -b",
                )
        write_beside(self.plan, companion_files(self.plan.base.folder), folder)
        write_certificate(folder, execution, weights, base_checks(self.plan))
