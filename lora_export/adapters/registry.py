"""From adapter_config.json and the adapter's tensors to updates. Exactly one kind claims a tensor."""

import importlib
import re
from collections.abc import Sequence
from typing import cast

from lora_export.adapters import mlx, saved, tokens
from lora_export.adapters.config import General
from lora_export.adapters.kind import AdapterFile, Kind, Layout
from lora_export.adapters.spelling import respelled
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.patterns import TOTAL, within
from lora_export.plugins import Plugin, plugins

CONFIG = "adapter_config.json"

# PEFT type → the modules of this package that read its tensors, imported when an adapter of the type is read.
KINDS: dict[str, tuple[str, ...]] = {
    "LORA": ("lora", "dora", "experts", "stacked", "attention"),
    "ADALORA": ("adalora",),
    "IA3": ("ia3",),
    "LOHA": ("loha",),
    "LOKR": ("lokr",),
    "VERA": ("vera",),
    "OFT": ("oft",),
    "BOFT": ("boft",),
    "MISS": ("miss",),
    "BONE": ("miss",),
    "HRA": ("hra",),
    "FOURIERFT": ("fourierft",),
    "VBLORA": ("vblora",),
    "RANDLORA": ("randlora",),
    "ROAD": ("road",),
    "SHIRA": ("shira",),
    "C3A": ("c3a",),
    "WAVEFT": ("waveft",),
    "DELORA": ("delora",),
    "GRALORA": ("gralora",),
    "LN_TUNING": ("ln_tuning",),
    "BEFT": ("beft",),
    "DEFT": ("deft",),
    "FROD": ("frod",),
    "GLORA": ("glora",),
    "HIRA": ("hira",),
    "OSF": ("osf",),
    "PEANUT": ("peanut",),
    "PSOFT": ("psoft",),
    "PVERA": ("pvera",),
    "SUPERTUNING": ("supertuning",),
    "TINYLORA": ("tinylora",),
    "UNILORA": ("unilora",),
    "ADAMSS": ("adamss",),
    "TRAINABLE_TOKENS": (),  # tokens.py reads the rows of tokens beside any type
}
# Files that other trainers lay out otherwise, which become PEFT's before a kind looks at them.
LAYOUTS: tuple[Layout, ...] = (mlx,)
# The groups of entry points. A kind's entry point is called as its PEFT type.
KINDS_GROUP, LAYOUTS_GROUP = "lora_export.adapter_kinds", "lora_export.adapter_layouts"

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


def kinds(peft_type: str) -> tuple[Kind, ...]:
    """The kinds that read an adapter of this type: built-in ones, or that of a plug-in; none if it is not known.

    InputError for a plug-in that cannot be used.
    """
    if peft_type in KINDS:
        return tuple(cast(Kind, importlib.import_module(f"{__package__}.{name}")) for name in KINDS[peft_type])
    plugin = _plugged_kinds().get(peft_type)
    return () if plugin is None else (cast(Kind, plugin.value),)


def _plugged_kinds() -> dict[str, Plugin]:
    """PEFT type → the plug-in that is called so. InputError for one that is no kind, or of a type that is known."""
    plugged = {}
    for plugin in plugins(KINDS_GROUP):
        plugin.check_members(Kind)
        peft_type = plugin.name.upper()
        if peft_type in KINDS or peft_type in _NEVER:
            raise plugin.refuse(f"claims the PEFT type {peft_type}, which is built in", "a PEFT type of its own")
        plugged[peft_type] = plugin
    return plugged


def layouts() -> tuple[Layout, ...]:
    """The built-in layouts, then those of plug-ins. InputError for a plug-in that cannot be used as one."""
    brought = plugins(LAYOUTS_GROUP)
    for plugin in brought:
        plugin.check_members(Layout)
    return (*LAYOUTS, *(cast(Layout, plugin.value) for plugin in brought))


def read_adapter(file: AdapterFile) -> Adapter:
    """Every tensor of the adapter as part of exactly one update; AdapterError for what cannot be merged."""
    with within(TOTAL, str(file.where)):
        return _read(file)


def _read(file: AdapterFile) -> Adapter:
    file = next((layout.as_peft(file) for layout in layouts() if layout.claims(file)), file)
    general = file.settings(General)
    file = respelled(file)
    kind = _peft_type(file, general)
    if kind in _NEVER:
        raise AdapterError(
            f"peft_type is {kind!r}: {_NEVER[kind]}",
            where=file.where,
            expected="an adapter that changes weights, such as LORA",
            next_step="serve it unmerged with PEFT",
        )
    plugged = _plugged_kinds()
    known = sorted({*KINDS, *plugged})
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
    updates = [u for k in (*kinds(kind), tokens) for u in k.read(file)]
    if not updates:
        raise file.refuse(
            f"the file holds no tensors of the kind {kind}",
            tensor=next(iter(file.tensors)),
            expected="tensors such as …q_proj.lora_A.weight",
            next_step="save the adapter with PEFT: model.save_pretrained(DIR)",
        )
    updates += saved.read(file, {key for u in updates for key in u.keys})
    _check_claims(updates, file)
    plugin = f"{plugged[kind].distribution} {plugged[kind].version}" if kind in plugged else None
    return Adapter(file.folder, kind.lower(), file.config, tuple(updates), file.tensors, plugin=plugin)


def _peft_type(file: AdapterFile, general: General) -> str:
    """What the configuration says, ms-swift's word for it, or LORA where the tensors leave no doubt."""
    peft_type = general.peft_type or general.swift_type
    plain = all(re.search(r"\.lora_[AB](\.|$)", name) for name in file.tensors)
    if peft_type is None and plain and {"r", "lora_alpha"} <= file.config.keys():
        return "LORA"
    return str(peft_type)


def _refuse_empty(file: AdapterFile, kind: str) -> None:
    """ZeRO-3 leaves each process with a part; saved ungathered, a tensor is there and holds nothing.

    AdaLoRA may prune a module to rank 0, and of one weight that VB-LoRA saves short, none is left. Elsewhere a size
    of 0 would let the others claim anything.
    """
    for name, info in file.tensors.items():
        known = kind == "ADALORA" or (kind == "VBLORA" and name.endswith("_topk_weights"))
        if info.shape == (0,) or (0 in info.shape and not known):
            raise file.refuse(
                f"the tensor is empty, its shape {list(info.shape)}: was it saved under ZeRO-3 without gathering "
                "the parameters?",
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
