"""OSF (arXiv:2504.07097, eq. 2): W' = W − U₀·S₀·V₀ + U·S·V, the smaller singular directions of W trained.

Only the trained part is saved: PEFT decomposes the base again, in fp32, whenever it loads the adapter. Its product
is the same whatever the signs of the singular vectors are, but where two singular values around the border are
close, it is as uncertain as they are; so the call is PEFT's own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import DECOMPOSITION
from lora_export.adapters.parts import Layered, layered
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "OSF"
PEFT_TYPES = ("OSF",)
FORMULA = "W − U₀·S₀·V₀ + U·S·V, U₀·S₀·V₀ of the smaller singular directions of W"

_PARTS = tuple(f"osf_svd_params.{part}_low" for part in "USV")


@dataclass(frozen=True)
class RemainderUpdate:
    """u·sizes·v in the place of the smallest singular directions of W; u (out, r), sizes (r), v (r, in).

    All rows together; the decomposition in fp32, what follows in float64 whatever comes in.
    """

    u: "torch.Tensor"
    sizes: "torch.Tensor"
    v: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        u, sizes, v = (part.double() for part in torch.linalg.svd(weight.float(), full_matrices=False))
        kept = len(sizes) - len(self.sizes)
        changed: torch.Tensor = weight.double() - (u[:, kept:] * sizes[kept:]) @ v[kept:]
        changed = changed + (self.u.double() * self.sizes.double()) @ self.v.double()
        return changed.to(weight.dtype)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: between them all is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. How many directions are kept follows from the trained rank."""
    found = layered(file, _PARTS)
    if found:
        file.refuse_weight(NAME)
    return [_update(layer) for layer in found]


def _update(layer: Layered) -> TargetUpdate:
    layer.need(*_PARTS)
    u, s, v = (layer.shape(m) for m in _PARTS)
    if not (len(u) == len(v) == 2 and u[1:] == s == v[:1] and s[0] <= min(u[0], v[1])):
        raise layer.disagree(*_PARTS, expected="U (out, r), S (r) and V (r, in)")

    def load(_: tuple[int, ...]) -> RemainderUpdate:
        return RemainderUpdate(*(layer.read(m) for m in _PARTS))

    return TargetUpdate(
        f"{layer.name}.weight",
        "osf",
        layer.used,
        ((u[0], v[1]),),
        load,
        row_wise=lambda _: False,
        copies=DECOMPOSITION,
    )
