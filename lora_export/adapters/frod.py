"""FRoD (AAAI 2026, doi:10.1609/aaai.v40i31.39813): W' = U·(Λ + S)·Vᵀ, where W = U·Λ₀·Vᵀ.

V is saved, one for all layers of a category (the last two components of their names); U is W·V⁻ᵀ with columns of
length 1, which PEFT computes in float64 when it loads the adapter and keeps in fp32. Λ is diagonal, S sparse.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import DECOMPOSITION
from lora_export.adapters.parts import Layered, integers, layered, linear_shapes
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "FRoD"
PEFT_TYPES = ("FROD",)
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
class RotatedUpdate:
    """U·(diag(diagonal) + S)·Vᵀ on the logical (out, in) weight: v (in, in), diagonal (in), the entries of S
    `values` (n) at `places` (2, n). All rows together, in float64 but for U. flipped: stored (in, out)."""

    v: "torch.Tensor"
    diagonal: "torch.Tensor"
    values: "torch.Tensor"
    places: "torch.Tensor"
    flipped: bool

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        v, exact = self.v.double(), weight.double()
        exact = exact.T if self.flipped else exact
        u = directions(v, exact).float().double()
        middle = torch.diag(self.diagonal.double())
        middle.index_put_((self.places[0], self.places[1]), self.values.double(), accumulate=True)
        changed = u @ (middle @ v.T)
        return (changed.T if self.flipped else changed).contiguous().to(weight.dtype)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: between them all is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()


def directions(v: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """U (out, in): W·V⁻ᵀ with columns of length 1, those that are shorter than `_SMALLEST` zero; float64."""
    import torch

    try:
        found = torch.linalg.solve(v, weight.T).T
    except RuntimeError:  # V is singular
        found = weight @ torch.linalg.pinv(v, rtol=1e-6).T
    lengths = torch.linalg.norm(found, dim=0)
    return torch.where(lengths > _SMALLEST, found / lengths, 0.0)


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
    found = layered(file, (_DIAGONAL, _SPARSE))
    if not found:
        return []
    file.refuse_weight(NAME)
    claimed: set[str] = set()
    updates = []
    for layer in found:
        shared = [f"{part}.{category(layer.name)}" for part in _SHARED]
        updates.append(_update(layer, shared, () if claimed.issuperset(shared) else tuple(shared)))
        claimed.update(shared)
    return updates


def _update(layer: Layered, shared: list[str], claims: tuple[str, ...]) -> TargetUpdate:
    file = layer.file
    layer.need(_DIAGONAL, _SPARSE)
    missing = [key for key in shared if key not in file.tensors]
    if missing:
        raise file.refuse(
            f"{missing[0]} is missing: the projections were not saved (save_projection is false), and PEFT makes "
            "them of the weights of all layers together whenever it loads the adapter",
            tensor=layer.name,
            expected="an adapter that was saved with save_projection=True",
            next_step=_SAVE_THEM,
        )
    diagonal, values = layer.shape(_DIAGONAL), layer.shape(_SPARSE)
    v, places, size = (file.tensors[key].shape for key in shared)
    if (
        len(v) != 2
        or v[0] != v[1]
        or diagonal != v[:1]
        or len(values) != 1
        or places != (2, *values)
        or size != (2,)
    ):
        raise file.refuse(
            f"V has the shape {list(v)}, Λ {list(diagonal)}, S {list(values)} at {list(places)}",
            tensor=layer.name,
            expected="V (in, in), Λ (in), as many values of S as places",
        )

    def load(_: tuple[int, ...]) -> RotatedUpdate:
        at = integers(file, shared[1], v[0])
        return RotatedUpdate(
            file.read(shared[0]), layer.read(_DIAGONAL), layer.read(_SPARSE), at, file.is_conv1d(layer.name)
        )

    return TargetUpdate(
        f"{layer.name}.weight",
        "frod",
        (*layer.used, *claims),
        linear_shapes(file, layer.name, None, v[0]),
        load,
        row_wise=lambda _: False,
        copies=DECOMPOSITION,
    )
