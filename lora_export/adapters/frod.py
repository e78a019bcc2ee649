"""FRoD (AAAI 2026, doi:10.1609/aaai.v40i31.39813): W' = U·(Λ + S)·Vᵀ, where W = U·Λ₀·Vᵀ.

V is saved, one for all layers of a category (the last two components of their names); U is W·V⁻ᵀ with columns of
length 1, which PEFT computes in float64 when it loads the adapter and keeps in fp32. Λ is diagonal, S sparse.
"""

from dataclasses import dataclass

import torch

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.updates import DECOMPOSITION, ExactUpdate, WholeTarget
from lora_export.contracts import TargetUpdate

NAME = "FRoD"
FORMULA = "U·(Λ + S)·Vᵀ with W = U·Λ₀·Vᵀ, V of all layers of a category"

_DIAGONAL, _SPARSE = "frod_lambda_l", "frod_lambda_s_values"
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
# What makes PEFT save the projections that it was told to leave out.
_SAVE_THEM = (
    "in Python: m = PeftModel.from_pretrained(BASE_MODEL, ADAPTER); [b._non_persistent_buffers_set.clear() for d "
    "in (m.base_model.frod_V, m.base_model.frod_s_indices, m.base_model.frod_s_size) for b in d.values()]; "
    "m.peft_config['default'].save_projection = True; m.save_pretrained(DIR)"
)
_SMALLEST = 1e-12  # of a column's length: shorter ones are zero


@dataclass(frozen=True)
class RotatedUpdate(ExactUpdate):
    """U·(diag(diagonal) + S)·Vᵀ: v (in, in), diagonal (in), the entries of S `values` (n) at `places` (2, n)."""

    v: torch.Tensor
    diagonal: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor
    flipped: bool

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        v = self.v.double()
        u = directions(v, weight).float().double()  # PEFT keeps it in fp32
        middle = torch.diag(self.diagonal.double())
        middle.index_put_((self.places[0], self.places[1]), self.values.double(), accumulate=True)
        return u @ (middle @ v.T)


def directions(v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """U (out, in): W·V⁻ᵀ with columns of length 1, those that are shorter than `_SMALLEST` zero; float64."""
    try:
        columns = torch.linalg.solve(v, weight.T).T
    except RuntimeError:  # V is singular
        columns = weight @ torch.linalg.pinv(v, rtol=1e-6).T
    lengths = torch.linalg.norm(columns, dim=0)
    return torch.where(lengths > _SMALLEST, columns / lengths, 0.0)


def category(module: str) -> str:
    """The name under which PEFT shares V among layers: encoder.layer.0.attention.self.query → self_query."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of a category claims what is shared. AdapterError without it."""
    file.refuse_weight(NAME)
    claimed: set[str] = set()
    updates = []
    for module in modules(file, _DIAGONAL, _SPARSE):
        shared = [f"{part}.{category(module.name)}" for part in _SHARED]
        updates.append(_update(module, shared, () if claimed.issuperset(shared) else tuple(shared)))
        claimed.update(shared)
    return updates


def _update(module: AdaptedModule, shared: list[str], claims: tuple[str, ...]) -> TargetUpdate:
    file = module.file
    module.need(_DIAGONAL, _SPARSE)
    missing = [key for key in shared if key not in file.tensors]
    if missing:
        raise file.refuse(
            f"{missing[0]} is missing: the projections were not saved (save_projection is false), and PEFT makes "
            "them of the weights of all layers together whenever it loads the adapter",
            tensor=module.name,
            expected="an adapter that was saved with save_projection=True",
            next_step=_SAVE_THEM,
        )
    diagonal, values = module.shape(_DIAGONAL), module.shape(_SPARSE)
    v, places, size = (file.tensors[key].shape for key in shared)
    square = len(v) == 2 and v[0] == v[1] and diagonal == v[:1]
    if not square or len(values) != 1 or places != (2, *values) or size != (2,):
        raise file.refuse(
            f"V has the shape {list(v)}, Λ {list(diagonal)}, S {list(values)} at {list(places)}",
            tensor=module.name,
            expected="V (in, in), Λ (in), as many values of S as places",
        )

    def load(_: tuple[int, ...]) -> RotatedUpdate:
        at = file.indices(shared[1], v[0])
        return RotatedUpdate(
            file.read(shared[0]), module.read(_DIAGONAL), module.read(_SPARSE), at, module.is_conv1d
        )

    used, shapes = (*module.used, *claims), module.stored(None, v[0])
    return WholeTarget(module.weight, "frod", used, shapes, load, copies=DECOMPOSITION)
