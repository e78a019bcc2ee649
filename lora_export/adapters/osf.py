"""OSF (arXiv:2504.07097, eq. 2): W' = W − U₀·S₀·V₀ + U·S·V, the smaller singular directions of W trained.

Only the trained part is saved: PEFT decomposes the base again, in fp32, whenever it loads the adapter. Its product
is the same whatever the signs of the singular vectors are, but where two singular values around the border are
close, it is as uncertain as they are; so the call is PEFT's own.
"""

from dataclasses import dataclass

import torch

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.updates import DECOMPOSITION, ExactUpdate, WholeTarget
from lora_export.contracts import TargetUpdate

NAME = "OSF"
FORMULA = "W − U₀·S₀·V₀ + U·S·V, U₀·S₀·V₀ of the smaller singular directions of W"

_PARTS = tuple(f"osf_svd_params.{part}_low" for part in "USV")


@dataclass(frozen=True)
class RemainderUpdate(ExactUpdate):
    """u·sizes·v in the place of the smallest singular directions of W; u (out, r), sizes (r), v (r, in).

    The decomposition is in fp32.
    """

    u: torch.Tensor
    sizes: torch.Tensor
    v: torch.Tensor

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        u, sizes, v = (part.double() for part in torch.linalg.svd(weight.float(), full_matrices=False))
        kept = len(sizes) - len(self.sizes)
        rest: torch.Tensor = weight - (u[:, kept:] * sizes[kept:]) @ v[kept:]
        return rest + (self.u.double() * self.sizes.double()) @ self.v.double()


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. How many directions are kept follows from the trained rank."""
    file.refuse_weight(NAME)
    return [_update(module) for module in complete(file, *_PARTS)]


def _update(module: AdaptedModule) -> TargetUpdate:
    u, s, v = (module.shape(p) for p in _PARTS)
    if not (len(u) == len(v) == 2 and u[1:] == s == v[:1] and s[0] <= min(u[0], v[1])):
        raise module.disagree("U (out, r), S (r) and V (r, in)")

    def load(_: tuple[int, ...]) -> RemainderUpdate:
        return RemainderUpdate(*(module.read(p) for p in _PARTS))

    return WholeTarget(module.weight, "osf", module.used, ((u[0], v[1]),), load, copies=DECOMPOSITION)
