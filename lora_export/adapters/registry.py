"""From adapter_config.json and the adapter's tensors to updates. Exactly one kind claims an adapter."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_export.adapters import lora, saved
from lora_export.adapters.config import parse_lora
from lora_export.contracts import Adapter, TargetUpdate, TensorSource
from lora_export.errors import AdapterError

CONFIG = "adapter_config.json"

_Reader = Callable[[TensorSource, Mapping[str, Any], Path, float], list[TargetUpdate]]


def _read_lora(source: TensorSource, config: Mapping[str, Any], where: Path, weight: float) -> list[TargetUpdate]:
    settings = parse_lora(config, where)
    updates = lora.read_updates(source, settings, weight)
    claimed = {key for u in updates for key in u.keys}
    if not claimed and source.tensors:
        raise AdapterError(
            "the file holds no LoRA matrices",
            where=where.parent,
            tensor=next(iter(source.tensors)),
            expected="tensors such as …q_proj.lora_A.weight",
            next_step="save the adapter with PEFT: model.save_pretrained(DIR)",
        )
    return updates + saved.read_updates(source, settings, weight, claimed)


KINDS: Mapping[str, _Reader] = {"LORA": _read_lora}

# Kinds that no merged weight can equal, with the reason.
_NEVER = {
    "PROMPT_TUNING": "prompt tuning adds virtual tokens to the input, not to the weights",
    "P_TUNING": "p-tuning adds virtual tokens to the input, not to the weights",
    "PREFIX_TUNING": "prefix tuning adds to the attention cache, not to the weights",
    "MULTITASK_PROMPT_TUNING": "prompt tuning adds virtual tokens to the input, not to the weights",
    "ADAPTION_PROMPT": "adaption prompts are inserted into the attention, not into the weights",
    "XLORA": "X-LoRA mixes adapters for each token, so no merged weight equals it",
    "POLY": "Poly routes by task, so no single merged weight equals it",
}


def read_adapter(folder: Path, config: Mapping[str, Any], source: TensorSource, weight: float = 1.0) -> Adapter:
    """Every tensor of the adapter as part of exactly one update; AdapterError for what cannot be merged."""
    where = folder / CONFIG
    kind = str(config.get("peft_type"))
    if kind in _NEVER:
        raise AdapterError(
            f"peft_type is {kind!r}: {_NEVER[kind]}",
            where=where,
            expected="an adapter that changes weights, such as LORA",
            next_step="serve it unmerged with PEFT",
        )
    if kind not in KINDS:
        raise AdapterError(
            f"peft_type is {kind!r}, which this tool does not merge",
            where=where,
            expected=f"one of {', '.join(KINDS)}",
            next_step="lora-export --version; a newer version may know it",
        )
    if not source.tensors:
        raise AdapterError("the adapter holds no tensors", where=folder, expected="LoRA matrices")
    updates = KINDS[kind](source, config, where, weight)
    _check_claims(updates, source, folder)
    return Adapter(folder, kind.lower(), config, tuple(updates), len(source.tensors))


def _check_claims(updates: list[TargetUpdate], source: TensorSource, folder: Path) -> None:
    claims: dict[str, str] = {}
    for update in updates:
        for key in update.keys:
            if key in claims:
                raise AdapterError(
                    f"two kinds claim this tensor: {claims[key]} and {update.kind}", where=folder, tensor=key
                )
            claims[key] = update.kind
    unused = set(source.tensors) - set(claims)
    if unused:
        raise AdapterError(
            f"{len(unused)} of {len(source.tensors)} adapter tensors would not be used",
            where=folder,
            tensor=min(unused),
            expected="every tensor used",
        )
