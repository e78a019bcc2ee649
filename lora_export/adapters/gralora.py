"""GraLoRA (arXiv:2505.20355, §3): W' = W + s·(a low-rank delta for each of k×k blocks, and one for the whole)."""

from dataclasses import dataclass

import torch

from lora_export.adapters.config import Count, Number, Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lycoris import product
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.updates import LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "GraLoRA"
FORMULA = "W + s·[Bⱼₙ·Aₙⱼ] in k×k blocks + s·B·A with hybrid_r, s = alpha/(r + hybrid_r)"

_BLOCKS = ("gralora_A", "gralora_B")
_GENERAL = ("gralora_A_general", "gralora_B_general")


@dataclass(frozen=True)
class Settings:
    """gralora_k: blocks in each direction; hybrid_r: rank of the delta for the whole weight, 0 for none."""

    r: Positive
    gralora_k: Positive
    alpha: Number
    hybrid_r: Count | None = None


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or GPT-2's Conv1D."""
    settings = file.settings(Settings)
    return [_update(module, settings) for module in modules(file, *_BLOCKS, *_GENERAL)]


def _update(module: AdaptedModule, settings: Settings) -> TargetUpdate:
    parts, rank, hybrid = settings.gralora_k, settings.r, settings.hybrid_r or 0
    module.need(*_BLOCKS, *(_GENERAL if hybrid or len(module.keys) > 2 else ()))
    if not hybrid and len(module.keys) > 2:
        raise module.disagree(f"{' and '.join(_GENERAL)} only where hybrid_r is not 0")
    a, b = (module.file.shape(module.keys[m], 3) for m in _BLOCKS)
    if (a[0], a[2], b[0], b[1]) != (parts, rank, parts, rank) or rank % parts:
        raise module.disagree(
            "(k, in/k, r) and (k, r, out/k), r a multiple of k", *_BLOCKS, also=f"gralora_k is {parts}, r {rank}"
        )
    inputs, outputs = parts * a[1], parts * b[2]
    if hybrid and [module.shape(m) for m in _GENERAL] != [(hybrid, inputs), (outputs, hybrid)]:
        raise module.disagree(
            f"({hybrid}, {inputs}) and ({outputs}, {hybrid})", *_GENERAL, also=f"hybrid_r is {hybrid}"
        )
    scaling = module.file.weight * settings.alpha / (rank + hybrid)

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        left, right = _factors(*(module.read(m) for m in _BLOCKS))
        if hybrid:
            a_general, b_general = (module.read(m) for m in _GENERAL)
            left, right = torch.cat([left, b_general], 1), torch.cat([right, a_general], 0)
        return LowRankUpdate.of(left, right, scaling, module.is_flipped(shape, outputs, inputs))

    shapes = ((outputs, inputs), (inputs, outputs))
    return TargetUpdate(module.weight, "gralora", module.used, shapes, load, adds=True, low_rank=True)


def _factors(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left (out, k·r), right (k·r, in): block (j, n) of the delta has the n-th slice of B[j], the j-th of A[n].

    a: (k, in/k, r); b: (k, r, out/k). Column (j, n, i) of the left is B[j] at its rank n·r/k + i, on the outputs of
    block j alone. Where k·r is no low rank, the whole delta and the identity.
    """
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
