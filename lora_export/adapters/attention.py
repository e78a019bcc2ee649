"""LoRA on torch's nn.MultiheadAttention, whose q, k and v are rows of one parameter (PEFT, lora/layer.py)."""

from collections.abc import Collection

from lora_export.adapters.config import LoraConfig, parse_lora
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate

NAME = "LoRA on MultiheadAttention"
PEFT_TYPES = ("LORA",)
FORMULA = "in_proj_weight + s·B·A, out_proj.weight + 2·s·B·A"

_PARTS = ("lora_A", "lora_B")
_OUT = ".base_layer.out_proj"
# PEFT's forward merges its two wrappers one after the other, and both add out_proj's delta: training saw it twice.
_TIMES = {"in_proj_weight": 1, "out_proj.weight": 2}


def claims(module: str, modules: Collection[str]) -> bool:
    """Whether these matrices are of an nn.MultiheadAttention or of its out_proj; modules: all names there are."""
    return module.endswith(_OUT) or f"{module}{_OUT}" in modules


def read(file: AdapterFile) -> list[TargetUpdate]:
    """Two updates for each attention."""
    found = group(file.tensors, _PARTS)
    owners = [n.removesuffix(_OUT) for n in found if n.endswith(_OUT)]
    if not owners:
        return []
    config = parse_lora(file.config, file.where)
    if config.residual or file.config.get("use_dora"):
        raise file.refuse(
            f"{config.residual or 'DoRA'} on nn.MultiheadAttention, which PEFT does not run",
            tensor=owners[0],
            expected="plain LoRA",
        )
    return [
        _update(file, config, owner, f"{owner}.{leaf}", found.get(inside, {}))
        for owner in owners
        for leaf, inside in (("in_proj_weight", owner), ("out_proj.weight", owner + _OUT))
    ]


def _update(file: AdapterFile, config: LoraConfig, owner: str, target: str, keys: dict[str, str]) -> TargetUpdate:
    from lora_export.adapters.lora import LowRank, LowRankUpdate

    missing = [p for p in _PARTS if p not in keys]
    if missing:
        raise file.refuse(
            f"{missing[0]} of this parameter is missing",
            tensor=target,
            expected="lora_A and lora_B of the attention and of its out_proj",
            next_step="save the adapter again: model.save_pretrained(DIR)",
        )
    a, b = (file.shape(keys[p], 2) for p in _PARTS)
    if a[0] != b[1]:
        raise file.refuse(
            f"A {list(a)} and B {list(b)} disagree about the rank",
            tensor=target,
            expected="A of shape (r, in) and B of shape (out, r)",
        )
    times = _TIMES[target.removeprefix(f"{owner}.")]
    scaling = times * file.weight * config.scaling(owner, a[0])

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        return LowRankUpdate(LowRank(file.read(keys["lora_B"]), file.read(keys["lora_A"]), scaling))

    held = (keys["lora_A"], keys["lora_B"])
    return TargetUpdate(target, "lora_attention", held, ((b[0], a[1]),), load, adds=True)
