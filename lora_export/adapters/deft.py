"""DEFT (PEFT's tuners/deft): W' = W − Q·(Kᵀ·W) + s·Q·R, a subspace of the outputs replaced. PaRa is it without R.

relu: Q is P, K is max(P, 0); qr: both are the orthonormal factor of P, in the sign of Householder's reflections,
which LAPACK and PEFT have.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import number, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.parts import Layered, layered, linear_shapes, one_of
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "DEFT"
PEFT_TYPES = ("DEFT",)
FORMULA = "W − Q·(Kᵀ·W) + s·Q·R, Q and K made of P"

_COPIES = 12  # in fp32: the weight, its change and the result, in float64


@dataclass(frozen=True)
class ProjectedUpdate:
    """W + q·(added − kᵀ·W) on the logical (out, in) weight; q, k (out, r), added (r, in) or (r, 1) zeros.

    All rows together: kᵀ·W adds up over the outputs. In float64 whatever comes in. flipped: stored (in, out).
    """

    q: "torch.Tensor"
    k: "torch.Tensor"
    added: "torch.Tensor"
    flipped: bool

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        exact = weight.double()
        exact = exact.T if self.flipped else exact
        q, k, added = (part.double() for part in (self.q, self.k, self.added))
        changed = exact + q @ (added - k.T @ exact)
        return (changed.T if self.flipped else changed).contiguous().to(weight.dtype)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: between them all is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; alpha scales what is put in, not what is taken out."""
    found = layered(file, ("deft_P", "deft_R"))
    if not found:
        return []
    file.refuse_weight(NAME)
    method = one_of(file, "decomposition_method", ("relu", "qr"))
    para = one_of(file, "para", (True, False))
    alpha = number(file.config, "alpha", file.where) if file.config.get("alpha") is not None else 0.0
    return [_update(layer, method, para, alpha) for layer in found]


def _update(layer: Layered, method: str, para: bool, alpha: float) -> TargetUpdate:
    file = layer.file
    layer.need("deft_P") if para else layer.need("deft_P", "deft_R")
    p, r = layer.shape("deft_P"), () if para else layer.shape("deft_R")
    rank = whole(file.config, "r", file.where)
    if (
        len(p) != 2
        or p[1] != min(rank, p[0])
        or (not para and (len(r) != 2 or r[0] != p[1]))
        or (para and "deft_R" in layer.keys)
    ):
        raise layer.disagree(*layer.keys, expected=f"P (out, {rank}), R ({rank}, in), and no R where para is set")
    scaling = alpha / p[1] if alpha else 1.0

    def load(_: tuple[int, ...]) -> ProjectedUpdate:
        q, k = _projection(layer.read("deft_P"), method)
        added = q.new_zeros(p[1], 1) if para else scaling * layer.read("deft_R").double()
        return ProjectedUpdate(q, k, added, file.is_conv1d(layer.name))

    return TargetUpdate(
        f"{layer.name}.weight",
        "deft",
        layer.used,
        linear_shapes(file, layer.name, p[0], None if para else r[1]),
        load,
        row_wise=lambda _: False,
        copies=_COPIES,
    )


def _projection(p: "torch.Tensor", method: str) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    exact = p.double()
    if method == "relu":
        return exact, torch.relu(exact)
    q = torch.linalg.qr(exact).Q
    return q, q
