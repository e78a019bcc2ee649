"""LoRA on torch's nn.MultiheadAttention, whose q, k and v are rows of one parameter (PEFT, lora/layer.py)."""

from collections.abc import Collection

from lora_export.adapters.config import LoraConfig, parse_lora
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.updates import LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "LoRA on MultiheadAttention"
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
    matrices = {module.name: module for module in modules(file, *_PARTS)}
    owners = [name.removesuffix(_OUT) for name in matrices if name.endswith(_OUT)]
    if not owners:
        return []
    config = parse_lora(file.config, file.where)
    if config.residual or file.config.get("use_dora"):
        raise file.refuse(
            f"{config.residual or 'DoRA'} on nn.MultiheadAttention, which PEFT cannot run",
            tensor=owners[0],
            expected="plain LoRA",
        )
    return [
        _update(config, owner, leaf, matrices.get(inside, AdaptedModule(file, inside, {})))
        for owner in owners
        for leaf, inside in (("in_proj_weight", owner), ("out_proj.weight", owner + _OUT))
    ]


def _update(config: LoraConfig, owner: str, leaf: str, module: AdaptedModule) -> TargetUpdate:
    module.need(*_PARTS)
    a, b = (module.file.shape(module.keys[p], 2) for p in _PARTS)
    if a[0] != b[1]:
        raise module.disagree("A of shape (r, in) and B of shape (out, r)")
    scaling = _TIMES[leaf] * module.file.weight * config.scaling(owner, a[0])

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        return LowRankUpdate.of(module.read("lora_B"), module.read("lora_A"), scaling)

    return TargetUpdate(f"{owner}.{leaf}", "lora_attention", module.used, ((b[0], a[1]),), load, adds=True)
