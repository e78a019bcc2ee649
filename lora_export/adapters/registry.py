"""From adapter_config.json and the adapter's tensors to updates. Exactly one kind claims a tensor."""

import re
from collections.abc import Sequence
from typing import cast

from lora_export.adapters import (
    adalora,
    adamss,
    attention,
    beft,
    boft,
    c3a,
    deft,
    delora,
    dora,
    experts,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    mlx,
    oft,
    osf,
    peanut,
    psoft,
    pvera,
    randlora,
    road,
    saved,
    shira,
    stacked,
    supertuning,
    tinylora,
    tokens,
    unilora,
    vblora,
    vera,
    waveft,
)
from lora_export.adapters.config import check_config
from lora_export.adapters.kind import AdapterFile, Kind, Layout
from lora_export.adapters.spelling import respelled
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.patterns import TOTAL, within
from lora_export.plugins import plugins

CONFIG = "adapter_config.json"

KINDS: tuple[Kind, ...] = (
    lora,
    dora,
    experts,
    stacked,
    attention,
    adalora,
    ia3,
    loha,
    lokr,
    vera,
    oft,
    boft,
    miss,
    hra,
    fourierft,
    vblora,
    randlora,
    road,
    shira,
    c3a,
    waveft,
    delora,
    gralora,
    ln_tuning,
    beft,
    deft,
    frod,
    glora,
    hira,
    osf,
    peanut,
    psoft,
    pvera,
    supertuning,
    tinylora,
    unilora,
    adamss,
)
# Files that other trainers lay out otherwise, which become PEFT's before a kind looks at them.
LAYOUTS: tuple[Layout, ...] = (mlx,)
TOKENS_ONLY = "TRAINABLE_TOKENS"
KINDS_GROUP, LAYOUTS_GROUP = "lora_export.adapter_kinds", "lora_export.adapter_layouts"  # entry points

# Kinds that no merged weight can equal, with the reason.
_NEVER = {
    "PROMPT_TUNING": "prompt tuning adds virtual tokens to the input, not to the weights",
    "P_TUNING": "p-tuning adds virtual tokens to the input, not to the weights",
    "CPT": "context-aware prompt tuning adds virtual tokens to the input, not to the weights",
    "PREFIX_TUNING": "prefix tuning adds to the attention cache, not to the weights",
    "CARTRIDGE": "a cartridge adds to the attention cache, not to the weights",
    "MULTITASK_PROMPT_TUNING": "prompt tuning adds virtual tokens to the input, not to the weights",
    "ADAPTION_PROMPT": "adaption prompts are inserted into the attention, not into the weights",
    "XLORA": "X-LoRA mixes adapters for each token, so no merged weight equals it",
    "POLY": "Poly routes by task, so no single merged weight equals it",
    "LILY": "Lily mixes its matrices by a router that sees the input, so no merged weight equals it",
    "SHADOW": "ShadowPEFT runs a second, smaller model beside the base, which no weight of the base can hold",
}


def kinds() -> tuple[Kind, ...]:
    """The built-in kinds, then those of plug-ins. InputError for a plug-in that cannot be used as one."""
    brought = plugins(KINDS_GROUP)
    # A PEFT type belongs to the built-in kinds, or to one plug-in.
    owners = dict.fromkeys((*(t for k in KINDS for t in k.PEFT_TYPES), TOKENS_ONLY, *_NEVER), "lora-export")
    for plugin in brought:
        plugin.check_members(Kind)
        for peft_type in cast(Kind, plugin.value).PEFT_TYPES:
            if owners.setdefault(peft_type, plugin.distribution) != plugin.distribution:
                raise plugin.refuse(
                    f"claims the PEFT type {peft_type}, which belongs to {owners[peft_type]}",
                    "a PEFT type of its own",
                )
    return (*KINDS, *(cast(Kind, plugin.value) for plugin in brought))


def layouts() -> tuple[Layout, ...]:
    """The built-in layouts, then those of plug-ins. InputError for a plug-in that cannot be used as one."""
    brought = plugins(LAYOUTS_GROUP)
    for plugin in brought:
        plugin.check_members(Layout)
    return (*LAYOUTS, *(cast(Layout, plugin.value) for plugin in brought))


def brought_by(peft_type: str) -> str | None:
    """The package that brings the kind of this PEFT type, and its version; None for a built-in kind."""
    for plugin in plugins(KINDS_GROUP):
        if peft_type in cast(Kind, plugin.value).PEFT_TYPES:
            return f"{plugin.distribution} {plugin.version}"
    return None


def read_adapter(file: AdapterFile) -> Adapter:
    """Every tensor of the adapter as part of exactly one update; AdapterError for what cannot be merged."""
    with within(TOTAL, str(file.where)):
        return _read(file)


def _read(file: AdapterFile) -> Adapter:
    file = next((layout.as_peft(file) for layout in layouts() if layout.claims(file)), file)
    check_config(file.config, file.where)
    file = respelled(file)
    kind = _peft_type(file)
    if kind in _NEVER:
        raise AdapterError(
            f"peft_type is {kind!r}: {_NEVER[kind]}",
            where=file.where,
            expected="an adapter that changes weights, such as LORA",
            next_step="serve it unmerged with PEFT",
        )
    known = sorted({t for k in kinds() for t in k.PEFT_TYPES} | {TOKENS_ONLY})
    if kind not in known:
        raise AdapterError(
            f"peft_type is {kind!r}, which this tool does not merge",
            where=file.where,
            expected=f"one of {', '.join(known)}",
            next_step="lora-export --version; a newer version may know it",
        )
    if not file.tensors:
        raise file.refuse("the adapter holds no tensors", expected="trained matrices")
    _refuse_empty(file, kind)
    updates = [u for k in (*kinds(), tokens) if kind in k.PEFT_TYPES or k is tokens for u in k.read(file)]
    if not updates:
        raise file.refuse(
            f"the file holds no tensors of the kind {kind}",
            tensor=next(iter(file.tensors)),
            expected="tensors such as …q_proj.lora_A.weight",
            next_step="save the adapter with PEFT: model.save_pretrained(DIR)",
        )
    updates += saved.read(file, {key for u in updates for key in u.keys})
    _check_claims(updates, file)
    return Adapter(file.folder, kind.lower(), file.config, tuple(updates), file.tensors, plugin=brought_by(kind))


def _peft_type(file: AdapterFile) -> str:
    """What the configuration says, ms-swift's word for it, or LORA where the tensors leave no doubt."""
    named = file.config.get("peft_type") or file.config.get("swift_type")
    plain = all(re.search(r"\.lora_[AB](\.|$)", name) for name in file.tensors)
    if named is None and plain and {"r", "lora_alpha"} <= file.config.keys():
        return "LORA"
    return str(named)


def _refuse_empty(file: AdapterFile, kind: str) -> None:
    """ZeRO-3 leaves each process with a part; saved ungathered, a tensor is there and holds nothing.

    AdaLoRA may prune a module to rank 0, and of one weight that VB-LoRA saves short, none is left. Elsewhere a size
    of 0 would let the others claim anything.
    """
    for name, info in file.tensors.items():
        known = kind == "ADALORA" or (kind == "VBLORA" and name.endswith("_topk_weights"))
        if info.shape == (0,) or (0 in info.shape and not known):
            raise file.refuse(
                f"the tensor is empty, its shape {list(info.shape)}: saved under ZeRO-3 without gathering the "
                "parameters?",
                tensor=name,
                expected="trained values",
                next_step="python zero_to_fp32.py CHECKPOINT OUT, or save with "
                "stage3_gather_16bit_weights_on_model_save",
            )


def _check_claims(updates: Sequence[TargetUpdate], file: AdapterFile) -> None:
    claims: dict[str, str] = {}
    for update in updates:
        for key in update.keys:
            if key in claims:
                raise file.refuse(
                    f"two kinds claim this tensor: {claims[key]} and {update.kind}",
                    tensor=key,
                    expected="exactly one kind for each tensor",
                )
            claims[key] = update.kind
    unused = set(file.tensors) - set(claims)
    if unused:
        raise file.refuse(
            f"{len(unused)} of {len(file.tensors)} adapter tensors would not be used",
            tensor=min(unused),
            expected="every tensor used",
        )
