"""GraLoRA (arXiv:2505.20355, §3): W' = W + s·(a low-rank delta for each of k×k blocks, and one for the whole)."""

from typing import TYPE_CHECKING

from lora_export.adapters.complete import complete, is_flipped
from lora_export.adapters.config import number, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import LowRank, LowRankUpdate
from lora_export.adapters.lycoris import product
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "GraLoRA"
PEFT_TYPES = ("GRALORA",)
FORMULA = "W + s·[Bⱼₙ·Aₙⱼ] in k×k blocks + s·B·A with hybrid_r, s = alpha/(r + hybrid_r)"

_BLOCKS = ("gralora_A", "gralora_B")
_GENERAL = ("gralora_A_general", "gralora_B_general")


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or GPT-2's Conv1D."""
    modules = complete(file, _BLOCKS)
    if not modules:
        return []
    hybrid = file.config.get("hybrid_r", 0)
    if hybrid != 0:
        hybrid = whole(file.config, "hybrid_r", file.where)
    general = complete(file, _GENERAL)
    odd = next((n for n in modules if (n in general) != bool(hybrid)), None)
    if odd is not None:
        raise file.refuse(
            f"hybrid_r is {hybrid}, and gralora_A_general is {'there' if odd in general else 'missing'}",
            tensor=odd,
            expected="gralora_A_general and gralora_B_general where hybrid_r is not 0, and only there",
        )
    return [_update(file, name, keys | general.get(name, {}), hybrid) for name, keys in modules.items()]


def _update(file: AdapterFile, name: str, keys: dict[str, str], hybrid: int) -> TargetUpdate:
    parts, rank = whole(file.config, "gralora_k", file.where), whole(file.config, "r", file.where)
    a, b = (file.shape(keys[m], 3) for m in _BLOCKS)
    if (a[0], a[2], b[0], b[1]) != (parts, rank, parts, rank) or rank % parts:
        raise file.refuse(
            f"gralora_A has the shape {list(a)}, gralora_B {list(b)}; gralora_k is {parts}, r {rank}",
            tensor=keys[_BLOCKS[0]],
            expected="(k, in/k, r) and (k, r, out/k), r a multiple of k",
        )
    inputs, outputs = parts * a[1], parts * b[2]
    if hybrid and [file.shape(keys[m], 2) for m in _GENERAL] != [(hybrid, inputs), (outputs, hybrid)]:
        raise file.refuse(
            f"gralora_A_general and gralora_B_general do not have the rank {hybrid} of hybrid_r",
            tensor=keys[_GENERAL[0]],
            expected=f"({hybrid}, {inputs}) and ({outputs}, {hybrid})",
        )
    scaling = file.weight * number(file.config, "alpha", file.where) / (rank + hybrid)

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        left, right = _factors(*(file.read(keys[m]) for m in _BLOCKS))
        if hybrid:
            left, right = _beside(left, right, *(file.read(keys[m]) for m in _GENERAL))
        if is_flipped(file, name, shape, outputs, inputs):
            left, right = right.T, left.T
        return LowRankUpdate(LowRank(left, right, scaling))

    shapes = ((outputs, inputs), (inputs, outputs))
    used = tuple(keys.values())
    return TargetUpdate(f"{name}.weight", "gralora", used, shapes, load, adds=True, low_rank=True)


def _factors(a: "torch.Tensor", b: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Left (out, k·r), right (k·r, in): block (j, n) of the delta has the n-th slice of B[j], the j-th of A[n].

    a: (k, in/k, r); b: (k, r, out/k). Column (j, n, i) of the left is B[j] at its rank n·r/k + i, on the outputs of
    block j alone. Where k·r is no low rank, the whole delta and the identity.
    """
    import torch

    parts, width, rank = a.shape
    height, part = b.shape[2], rank // parts
    if parts * rank > parts * min(width, height):
        slices = (b.reshape(parts, parts, part, height), a.reshape(parts, width, parts, part))
        delta = product("jnso,nijs->joni", *slices).reshape(parts * height, parts * width)
        sides = (delta, torch.eye(parts * width, dtype=a.dtype))
        return sides if width <= height else (torch.eye(parts * height, dtype=a.dtype), delta)
    left = torch.zeros(parts, height, parts, rank, dtype=a.dtype)
    right = torch.zeros(parts, parts, part, parts, width, dtype=a.dtype)
    for j in range(parts):
        left[j, :, j] = b[j].T
        for n in range(parts):
            right[j, n, :, n] = a[n, :, j * part : (j + 1) * part].T
    return left.reshape(parts * height, parts * rank), right.reshape(parts * rank, parts * width)


def _beside(
    left: "torch.Tensor", right: "torch.Tensor", a: "torch.Tensor", b: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    return torch.cat([left, b], 1), torch.cat([right, a], 0)
