"""What an adapter has learnt, from its numbers: the sizes and singular values of its deltas, and what they mean."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_export.adapter_tools.advice import config_trouble, sentences, trouble
from lora_export.adapter_tools.spectrum import Module, alone, by_layer, by_type, truncation, with_base, with_share
from lora_export.adapters import CONFIG, AdapterFile, read_adapter
from lora_export.adapters.spelling import respelled
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import AdapterChoice, MergeOptions, Progress
from lora_export.errors import InputError
from lora_export.merging import plan
from lora_export.progress import Silent
from lora_export.storage.documents import finite

__all__ = ["Module", "Understanding", "understand"]


@dataclass(frozen=True)
class Understanding:
    """sentences: what the figures say; warnings: signs of trouble; truncation: (rank, share of ‖ΔW‖² that is kept,
    share of the numbers that are left) of all low-rank modules together; skipped: module → why it has no figures.
    """

    adapter: str
    modules: tuple[Module, ...]
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    truncation: tuple[tuple[int, float, float], ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "kind": "adapter",
            "adapter": self.adapter,
            "sentences": list(self.sentences),
            "warnings": list(self.warnings),
            "truncation": [
                {"rank": r, "energy_kept": kept, "parameters": left} for r, kept, left in self.truncation
            ],
            "by_type": by_type(self.modules),
            "modules": [asdict(m) | {"type": m.type} for m in self.modules],
            "skipped": dict(self.skipped),
        }
        known: dict[str, Any] = finite(document)
        return known


def understand(adapter: Path, base: Path | None = None, progress: Progress | None = None) -> Understanding:
    """Read the numbers of an adapter, and of the base's weights that it changes. Raises as a merge would.

    Without a base, kinds whose change depends on the weight have no figures; of DoRA they are of B·A alone.
    """
    progress = progress or Silent()
    config, tensors = open_adapter_files(adapter)
    file = respelled(AdapterFile(tensors, config, adapter / CONFIG, allow_nonfinite=True))
    planned = plan(base, [AdapterChoice(adapter)], MergeOptions(allow_nonfinite=True)) if base else None
    read, skipped = planned.adapters[0] if planned else read_adapter(file), dict[str, str]()
    source = with_base(planned, file) if planned else alone(file, read, skipped)
    modules = []
    for module in source:
        modules.append(module)
        progress.advance(len(modules), len(read.updates))
    if not modules:
        raise InputError(
            f"the change of this adapter ({', '.join(sorted({u.kind for u in read.updates}))}) depends on the base",
            where=adapter,
            expected="the base beside it",
            next_step=f"lora-export inspect -a {adapter} -b BASE",
        )
    modules.sort(key=by_layer)
    total = sum(m.norm**2 for m in modules if m.finite)
    shared = tuple(with_share(m, total) for m in modules)
    by_rank = tuple(truncation(shared))
    warnings = (*trouble(shared), *config_trouble(shared, config, file))
    return Understanding(
        adapter.resolve().name, shared, tuple(sentences(shared, by_rank)), warnings, by_rank, skipped
    )
