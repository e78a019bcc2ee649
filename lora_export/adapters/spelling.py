"""Names of adapter tensors as trainers and their wrappers write them, brought to the model's own.

base_model.model.model.layers.0.q_proj.lora_A.default.weight → model.layers.0.q_proj.lora_A.weight
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TensorInfo, TensorSource

# torch.compile, activation checkpointing and FSDP put a component of their own into every name.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# DDP, TRL's value-head models and distributed checkpoints stand before PEFT's own prefix.
_OUTER = ("module.", "pretrained_model.", "model_state.model.")
_PREFIXES = ("base_model.model.", "base_model.")
_ADAPTER_NAME = re.compile(
    r"(?P<marker>(?:^|\.)(?:(?:lora|ia3|hada|lokr|vera|oft|boft"
    r"|miss|bone|hra|fourierft|vblora|randlora|road|shira|c3a|waveft|delora|gralora|ln_tuning"
    r"|hira|pvera|beft|unilora|frod_lambda|deft)_\w+|tinylora_[ABP]|supertuning_(?:indices|values|lora_[AB])"
    r"|trainable_tokens_delta))"
    r"\.(?!(?:weight|bias)$)(?P<name>[^.]+)(?P<leaf>(?:\.(?:weight|bias))?)$"
)
_SAVED = ".modules_to_save."
_TINKER_HEAD = "model.unembed_tokens."


@dataclass(frozen=True)
class Respelled(TensorSource):
    """Tensors of a file under the model's names."""

    tensors: Mapping[str, TensorInfo]


def respelled(file: AdapterFile) -> AdapterFile:
    """The same file under the model's names. AdapterError if it holds several adapters, or a tensor twice."""
    plain = {key: _without_prefix(key) for key in file.tensors}
    adapters = sorted({m["name"] for name in plain.values() if (m := _ADAPTER_NAME.search(name))})
    if len(adapters) > 1:
        raise file.refuse(
            f"the file holds several adapters: {', '.join(adapters)}",
            expected="one adapter in a file",
            next_step=f"in Python: model.save_pretrained(DIR, selected_adapters=[{adapters[0]!r}])",
        )
    names: dict[str, str] = {}
    for key, name in plain.items():
        ours = _without_adapter_name(name, {"default", *adapters})
        if ours in names:
            raise file.refuse(
                f"two tensors have the same meaning, {names[ours]} and {key}", tensor=key, expected="one of them"
            )
        names[ours] = key
    tensors = {ours: file.tensors[theirs] for ours, theirs in names.items()}
    return replace(file, source=Respelled(tensors))


def _without_prefix(key: str) -> str:
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    for outer in _OUTER:
        if name.startswith(f"{outer}base_model."):
            name = name.removeprefix(outer)
    while name.startswith(_PREFIXES):
        name = next(name.removeprefix(p) for p in _PREFIXES if name.startswith(p))
    return f"lm_head.{name.removeprefix(_TINKER_HEAD)}" if name.startswith(_TINKER_HEAD) else name


def _without_adapter_name(name: str, adapters: set[str]) -> str:
    name = _ADAPTER_NAME.sub(r"\g<marker>\g<leaf>", name)
    head, saved, tail = name.partition(_SAVED)
    first, dot, rest = tail.partition(".")
    return f"{head}{saved}{rest}" if saved and dot and first in adapters else name
