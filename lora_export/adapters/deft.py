"""DEFT (PEFT's tuners/deft): W' = W − Q·(Kᵀ·W) + s·Q·R, a subspace of the outputs replaced. PaRa is it without R.

relu: Q is P, K is max(P, 0); qr: both are the orthonormal factor of P, in the sign of Householder's reflections,
which LAPACK and PEFT have.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from lora_export.adapters.config import Number, Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.updates import ExactUpdate, WholeTarget
from lora_export.contracts import TargetUpdate

NAME = "DEFT"
FORMULA = "W − Q·(Kᵀ·W) + s·Q·R, Q and K made of P"

_COPIES = 12  # in fp32: the weight, its change and the result, in float64


@dataclass(frozen=True)
class Settings:
    """alpha scales what is put in, not what is taken out; 0 or null: not at all. para: there is no R."""

    r: Positive
    decomposition_method: Literal["relu", "qr"]
    para: bool
    alpha: Number | None = None


@dataclass(frozen=True)
class ProjectedUpdate(ExactUpdate):
    """W + q·(added − kᵀ·W): q, k (out, r), added (r, in) or (r, 1) zeros; kᵀ·W adds up over the outputs."""

    q: torch.Tensor
    k: torch.Tensor
    added: torch.Tensor
    flipped: bool

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        q, k, added = (part.double() for part in (self.q, self.k, self.added))
        return weight + q @ (added - k.T @ weight)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer."""
    file.refuse_weight(NAME)
    settings = file.settings(Settings)
    return [_update(module, settings) for module in modules(file, "deft_P", "deft_R")]


def _update(module: AdaptedModule, settings: Settings) -> TargetUpdate:
    rank, para = settings.r, settings.para
    module.need("deft_P") if para else module.need("deft_P", "deft_R")
    p, r = module.shape("deft_P"), () if para else module.shape("deft_R")
    good = len(p) == 2 and p[1] == min(rank, p[0])
    if not good or ("deft_R" in module.keys if para else len(r) != 2 or r[0] != p[1]):
        raise module.disagree(f"P (out, {rank}), R ({rank}, in), and no R where para is set")
    scaling = settings.alpha / p[1] if settings.alpha else 1.0

    def load(_: tuple[int, ...]) -> ProjectedUpdate:
        q, k = _projection(module.read("deft_P"), settings.decomposition_method)
        added = q.new_zeros(p[1], 1) if para else scaling * module.read("deft_R").double()
        return ProjectedUpdate(q, k, added, module.is_conv1d)

    shapes = module.stored(p[0], None if para else r[1])
    return WholeTarget(module.weight, "deft", module.used, shapes, load, copies=_COPIES)


def _projection(p: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K."""
    exact = p.double()
    if method == "relu":
        return exact, torch.relu(exact)
    q = torch.linalg.qr(exact).Q
    return q, q
