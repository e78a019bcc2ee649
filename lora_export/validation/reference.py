"""The models that are compared, as transformers and PEFT themselves build them, in fp32.

This is the oracle: PEFT's unmerged forward. It shares no formula and no reader with merging/ and adapters/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_export import sealed
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError
from lora_export.patterns import bounded
from lora_export.validation import streaming
from lora_export.validation.effective import wrapped_modules
from lora_export.validation.loading import (
    architecture,
    classes_of,
    configs_of,
    load_results,
    load_trained_on,
    quiet,
    whole_tensors,
)
from lora_export.validation.resized import fit_vocabulary, saved_twice

LIKELY_RANK = 1024  # that a configuration may give without a tensor to show for it: each of them may have its own
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Unmerged:
    """model: PEFT's; cls: the transformers class of its base; absent: what that class has and the base's files have
    not (a pooler, say), with the values that it began with here."""

    model: Any
    cls: Any
    absent: Mapping[str, torch.Tensor]


def load_unmerged(
    base: Path,
    adapters: Sequence[AdapterChoice],
    options: MergeOptions,
    dequantized: Path | None = None,
    keep: int | None = None,
) -> Unmerged:
    """keep: None for a base in memory; else it is streamed, and so many bytes of it may stay there between uses.

    The class is the first of these into which every tensor of the adapters fits: the one that config.json names,
    the one of the adapter's task, the bare body. AdapterError if there is none.
    """
    import peft.utils.error

    unused: list[str] = []
    for cls in classes_of(dequantized or base, adapters):
        model, absent = load_trained_on(base, options, dequantized, cls, keep, whole_tensors(adapters))
        if keep is not None:
            streaming.refuse_changing_inits(configs_of(adapters), adapters[0].folder)
        try:
            unmerged, left = _attach(model, adapters)
        except peft.utils.error.NoMatchingPeftModuleError:
            continue  # this class has no layer of the adapter's
        if not left:
            streaming.attach(model, wrapped_modules(model).values())
            return Unmerged(unmerged, cls, absent)
        unused = unused or left
    raise _left_over(unused, architecture(base).__name__, adapters)


def attach_adapters(model: torch.nn.Module, adapters: Sequence[AdapterChoice]) -> Any:
    """PEFT's unmerged model. AdapterError if a tensor of the adapters finds no place in it."""
    unmerged, left = _attach(model, adapters)
    if left:
        raise _left_over(left, type(model).__name__, adapters)
    return unmerged


def _refuse_bomb(folder: Path) -> None:
    """Refuse a configuration for which PEFT would fill the memory before it looks at the tensors."""
    config = sealed.read_json(folder / "adapter_config.json", limit=sealed.LARGEST_SETTINGS)
    patterns, replicated = config.get("rank_pattern"), config.get("layer_replication")
    sizes = [config.get("r"), config.get("init_r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    rank = max((n for n in sizes if isinstance(n, int)), default=0)
    if rank > max(LIKELY_RANK, _largest_size(folder)):
        raise AdapterError(
            f"the configuration gives rank {rank}, and no tensor has a dimension of that size",
            where=folder,
            expected="rank_pattern and r that describe the file",
        )
    ranges = replicated if isinstance(replicated, list) else []
    pairs = [r for r in ranges if isinstance(r, list) and len(r) == 2 and all(isinstance(n, int) for n in r)]
    if len(ranges) > MOST_LAYERS or sum(max(0, end - start) for start, end in pairs) > MOST_LAYERS:
        raise AdapterError(
            "layer_replication makes too many layers", where=folder, expected=f"at most {MOST_LAYERS}"
        )


def _largest_size(folder: Path) -> int:
    sizes = [1]
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            sizes += (n for name in tensors.keys() for n in tensors.get_slice(name).get_shape())  # noqa: SIM118
    return max(sizes)


def _left_over(tensors: Sequence[str], cls: str, adapters: Sequence[AdapterChoice]) -> AdapterError:
    return AdapterError(
        f"PEFT finds {len(tensors)} tensors of the adapter without a place in {cls}, or layers without a tensor",
        where=adapters[0].folder,
        tensor=tensors[0],
        expected="an adapter that PEFT itself loads into this base with nothing left over",
    )


def _attach(model: torch.nn.Module, adapters: Sequence[AdapterChoice]) -> tuple[Any, list[str]]:
    """(PEFT's unmerged model, tensors left over or missing). Adapters act together, each with its weight."""
    import peft

    for adapter in adapters:
        _refuse_bomb(adapter.folder)
    fit_vocabulary(model, adapters)
    names = [f"adapter{i}" for i in range(len(adapters))]
    with load_results() as results, bounded("peft", str(adapters[0].folder)):
        unmerged = peft.PeftModel.from_pretrained(
            model, adapters[0].folder, adapter_name=names[0], local_files_only=True
        )
        for name, choice in zip(names[1:], adapters[1:], strict=True):
            unmerged.load_adapter(choice.folder, adapter_name=name)
    left = [key for told in results for key in (*told.unexpected_keys, *told.missing_keys)]
    left = [key for key in left if not saved_twice(key, adapters)]
    if len(names) > 1:
        unmerged.base_model.set_adapter(names)
    for module in unmerged.modules():
        for name, choice in zip(names, adapters, strict=True):
            scaling = getattr(module, "scaling", None)
            if choice.weight != 1.0 and isinstance(scaling, dict) and name in scaling:
                scaling[name] *= choice.weight
    return quiet(unmerged), left
