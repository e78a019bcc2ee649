"""LoRA on experts with their matrices stacked, as Tinker and SGLang write it: W[e] + s·B[e]·A[e].

A is (experts, r, in) and B (experts, out, r); where all experts share one of the two, its first size is 1.
"""

import re
from typing import TYPE_CHECKING

from lora_export.adapters.config import LoraConfig, parse_lora
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.updates import LowRankUpdate
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "LoRA on stacked experts"
FORMULA = "W[e] + s·B[e]·A[e], A or B shared by all experts where its first size is 1"

_PARTS = ("lora_A", "lora_B")
_MODULE = re.compile(r"(?P<owner>(?:.+\.)?experts)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj|gate_up_proj)")


def claims(module: AdaptedModule) -> bool:
    """Whether this module's matrices have a dimension of experts."""
    return _MODULE.fullmatch(module.name) is not None and all(len(module.shape(p)) == 3 for p in module.keys)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each expert of each projection, under the name that a single expert's weight has."""
    stacks = [module for module in modules(file, *_PARTS) if claims(module)]
    if not stacks:
        return []
    config = parse_lora(file.config, file.where)
    return [update for module in stacks for update in _updates(config, module)]


def _updates(config: LoraConfig, module: AdaptedModule) -> list[TargetUpdate]:
    module.need(*_PARTS)
    a, b = (module.shape(p) for p in _PARTS)
    experts, rank = max(a[0], b[0]), a[1]
    if b[2] != rank or experts == 1 or not {a[0], b[0]} <= {1, experts}:
        raise module.disagree(
            "stacks of the same experts: A of shape (experts or 1, r, in) and B of shape (experts or 1, out, r)"
        )
    match = _MODULE.fullmatch(module.name)
    assert match is not None
    scaling = module.file.weight * config.scaling(module.name, rank)

    def matrix(part: str, expert: int) -> "torch.Tensor":
        stack = module.read(part)
        return stack[expert if len(stack) > 1 else 0]

    def of(expert: int) -> TargetUpdate:
        def load(_: tuple[int, ...]) -> LowRankUpdate:
            return LowRankUpdate.of(matrix("lora_B", expert), matrix("lora_A", expert), scaling)

        target = f"{match['owner']}.{expert}.{match['part']}.weight"
        used = module.used if expert == 0 else ()
        return TargetUpdate(target, "lora_stacked", used, ((b[1], a[2]),), load, adds=True)

    return [of(expert) for expert in range(experts)]
