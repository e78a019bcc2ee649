"""What an adapter has learnt, from its numbers: the sizes and singular values of its deltas, and what they mean."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.adapter_tools.advice import config_trouble, sentences, trouble
from lora_export.adapter_tools.spectrum import alone, by_layer, by_type, truncation, with_base, with_share
from lora_export.adapters import CONFIG, AdapterFile, read_adapter
from lora_export.adapters.spelling import respelled
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import AdapterChoice, MergeOptions, ModuleFigures, Progress, Understanding
from lora_export.errors import InputError
from lora_export.merging import plan
from lora_export.progress import Silent


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
    return understood(adapter, modules, skipped, config, file)


def understood(
    adapter: Path,
    modules: list[ModuleFigures],
    skipped: Mapping[str, str],
    config: Mapping[str, Any],
    file: AdapterFile,
) -> Understanding:
    """What the figures of all weights say together."""
    modules.sort(key=by_layer)
    total = sum(m.norm**2 for m in modules if m.finite)
    shared = tuple(with_share(m, total) for m in modules)
    by_rank = tuple(truncation(shared))
    warnings = (*trouble(shared), *config_trouble(shared, config, file))
    return Understanding(
        adapter=adapter.resolve().name,
        sentences=tuple(sentences(shared, by_rank)),
        warnings=warnings,
        truncation=by_rank,
        by_type=by_type(shared),
        modules=shared,
        skipped=skipped,
    )
