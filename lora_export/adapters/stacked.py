"""LoRA on experts with their matrices stacked, as Tinker and SGLang write it: W[e] + s·B[e]·A[e].

A is (experts, r, in) and B (experts, out, r); where all experts share one of the two, its first size is 1.
"""

import re
from typing import TYPE_CHECKING

from lora_export.adapters.config import LoraConfig, parse_lora
from lora_export.adapters.experts import MatrixUpdate
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "LoRA on stacked experts"
PEFT_TYPES = ("LORA",)
FORMULA = "W[e] + s·B[e]·A[e], A or B shared by all experts where its first size is 1"

_PARTS = ("lora_A", "lora_B")
_MODULE = re.compile(r"(?P<owner>(?:.+\.)?experts)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj|gate_up_proj)")


def claims(file: AdapterFile, module: str, keys: dict[str, str]) -> bool:
    """Whether this module's matrices have a dimension of experts."""
    return _MODULE.fullmatch(module) is not None and all(len(file.tensors[k].shape) == 3 for k in keys.values())


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each expert of each projection, under the name that a single expert's weight has."""
    found = {n: k for n, k in group(file.tensors, _PARTS).items() if claims(file, n, k)}
    if not found:
        return []
    config = parse_lora(file.config, file.where)
    return [update for module, keys in found.items() for update in _module(file, config, module, keys)]


def _module(file: AdapterFile, config: LoraConfig, module: str, keys: dict[str, str]) -> list[TargetUpdate]:
    missing = [p for p in _PARTS if p not in keys]
    if missing:
        raise file.refuse(f"{missing[0]} of this module is missing", tensor=module, expected="lora_A and lora_B")
    a, b = (file.tensors[keys[p]].shape for p in _PARTS)
    experts, rank = max(a[0], b[0]), a[1]
    if b[2] != rank or experts == 1 or not {a[0], b[0]} <= {1, experts}:
        raise file.refuse(
            f"A {list(a)} and B {list(b)} are no stacks of the same experts",
            tensor=module,
            expected="A of shape (experts or 1, r, in) and B of shape (experts or 1, out, r)",
        )
    match = _MODULE.fullmatch(module)
    assert match is not None
    scaling = file.weight * config.scaling(module, rank)

    def matrix(part: str, expert: int) -> "torch.Tensor":
        whole = file.read(keys[part])
        return whole[expert if len(whole) > 1 else 0]

    def of(expert: int) -> TargetUpdate:
        def load(_: tuple[int, ...]) -> MatrixUpdate:
            return MatrixUpdate(matrix("lora_A", expert), matrix("lora_B", expert), scaling)

        claimed = (keys["lora_A"], keys["lora_B"]) if expert == 0 else ()
        target = f"{match['owner']}.{expert}.{match['part']}.weight"
        return TargetUpdate(target, "lora_stacked", claimed, ((b[1], a[2]),), load, adds=True)

    return [of(expert) for expert in range(experts)]
