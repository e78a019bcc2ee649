"""TinyLoRA (arXiv:2602.04118, eq. 3): W' = W + B·(Σᵢ vᵢ·Pᵢ)·A, with B·A the largest singular directions of W.

A and B are saved. v is shared by groups of layers, and P is drawn for each layer: both go by the layer's number
among the adapted ones, in the order of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora_export.adapters.config import number, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import LowRank, LowRankUpdate
from lora_export.adapters.parts import Layered, Shapes, in_order, layered, one_of
from lora_export.contracts import TargetUpdate
from lora_export.storage.documents import is_kind

if TYPE_CHECKING:
    import torch

NAME = "TinyLoRA"
PEFT_TYPES = ("TINYLORA",)
FORMULA = "W + B·(Σ v[i]·P[i])·A, B·A of the singular directions of W, v shared by groups of layers"

_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"
_VECTORS = "tinylora_v."


@dataclass(frozen=True)
class Groups:
    """Which layer has which number, and so which vector."""

    file: AdapterFile
    modules: tuple[str, ...]
    vectors: Mapping[str, str]  # group's number → key
    tying: float
    seed: int

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Module → its number. AdapterError without a base, whose order of modules it is."""
        if self.file.base is None:
            raise self.file.refuse(
                "which layer has which of the trained vectors follows from the order of the base's layers",
                expected="the base beside the adapter",
            )
        return {n: i for i, n in enumerate(in_order(self.file, self.modules))}

    @property
    def count(self) -> int:
        return max(1, round(len(self.modules) * (1.0 - self.tying)))

    def vector(self, module: str) -> str:
        """The key of its vector."""
        size = max(1, len(self.modules) // self.count)
        return self.vectors[str(min(self.numbers[module] // size, self.count - 1))]


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims the vectors."""
    found = layered(file, (_A, _B, _P))
    if not found:
        return []
    groups = _groups(file, tuple(layer.name for layer in found))
    saved = one_of(file, "save_projection", (True, False))
    extra = next((layer for layer in found if _P in layer.keys and not saved), None)
    if extra is not None:
        raise file.refuse(
            "save_projection is false, but the file holds a projection, which PEFT would not use",
            tensor=extra.name,
            expected="save_projection: true, or a file without tinylora_P",
        )
    if file.base is not None:
        _ = groups.numbers  # refused before anything is written
    first = found[0].name
    return [
        _update(layer, groups, tuple(groups.vectors.values()) if layer.name == first else ()) for layer in found
    ]


def _groups(file: AdapterFile, modules: tuple[str, ...]) -> Groups:
    vectors = {k.removeprefix(_VECTORS): k for k in file.tensors if k.startswith(_VECTORS)}
    tying, seed = number(file.config, "weight_tying", file.where), file.config.get("projection_seed")
    if not 0 <= tying <= 1 or not is_kind(seed, int):
        raise file.refuse(
            f"weight_tying is {tying:g}, projection_seed {seed!r}", expected="a share from 0 to 1, and a seed"
        )
    groups = Groups(file, modules, vectors, tying, int(seed or 0))
    wanted, size = {str(i) for i in range(groups.count)}, whole(file.config, "u", file.where)
    # A group that the rounding leaves without a layer has no vector.
    wrong = next((k for k in vectors.values() if file.tensors[k].shape != (size,)), None)
    if wrong or not vectors or not vectors.keys() <= wanted:
        raise file.refuse(
            f"{len(vectors)} vectors for {len(modules)} layers, weight_tying is {tying:g} and u {size}",
            tensor=wrong,
            expected=f"vectors tinylora_v.0 to tinylora_v.{groups.count - 1} of {size} numbers",
        )
    return groups


def _update(layer: Layered, groups: Groups, claims: tuple[str, ...]) -> TargetUpdate:
    file = layer.file
    layer.need(_A, _B)
    a, b, size = layer.shape(_A), layer.shape(_B), whole(file.config, "u", file.where)
    rank = min(whole(file.config, "r", file.where), a[-1], b[0])
    if (
        len(a) != 2
        or len(b) != 2
        or a[0] != rank
        or b[1] != rank
        or (_P in layer.keys and layer.shape(_P) != (size, rank, rank))
    ):
        raise layer.disagree(
            *layer.keys, expected=f"A ({rank}, in), B (out, {rank}) and P ({size}, {rank}, {rank})"
        )
    if file.base is not None and groups.numbers and _missing(groups, layer.name):
        raise file.refuse("the vector of this layer is missing", tensor=layer.name, expected=_VECTORS + "…")

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        import torch

        vector, found = file.read(groups.vector(layer.name)), layer.model_layer()
        projections = layer.read(_P) if _P in layer.keys else drawn(groups, layer.name, size, rank)
        turn = torch.einsum("i,ijk->jk", vector, projections.to(vector.dtype))
        # PEFT adds to what an embedding looked up after the base layer's own factor, without that factor.
        left, right = layer.read(_B) @ turn, layer.read(_A) / (found.scale if found else 1.0)
        return LowRankUpdate(LowRank(*((right.T, left.T) if flipped else (left, right)), file.weight))

    flipped = file.is_conv1d(layer.name)
    shapes: Shapes = ((a[1], b[0]),) if flipped else ((b[0], a[1]),)
    return TargetUpdate(
        f"{layer.name}.weight",
        "tinylora",
        (layer.keys[_A], layer.keys[_B], *(layer.keys[m] for m in layer.keys if m == _P), *claims),
        shapes,
        load,
        adds=True,
        low_rank=True,
    )


def _missing(groups: Groups, module: str) -> bool:
    try:
        groups.vector(module)
    except KeyError:
        return True
    return False


def drawn(groups: Groups, module: str, size: int, rank: int) -> "torch.Tensor":
    """P of shape (u, r, r) as PEFT draws it for this layer: normal, of the variance 1/r."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(groups.seed + groups.numbers[module])
    return torch.normal(mean=0.0, std=1.0 / rank**0.5, size=(size, rank, rank), generator=generator)
