"""TinyLoRA (arXiv:2602.04118, eq. 3): W' = W + B·(Σᵢ vᵢ·Pᵢ)·A, with B·A the largest singular directions of W.

A and B are saved. v is shared by groups of layers, and P is drawn for each layer: both go by the layer's number
among the adapted ones, in the order of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from lora_export.adapters.config import Number, Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.updates import LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "TinyLoRA"
FORMULA = "W + B·(Σ v[i]·P[i])·A, B·A of the singular directions of W, v shared by groups of layers"

_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"
_VECTORS = "tinylora_v."


@dataclass(frozen=True)
class Settings:
    """u: numbers of a vector; weight_tying: the share of vectors that is saved by tying layers, 0 to 1."""

    r: Positive
    u: Positive
    weight_tying: Number
    projection_seed: int
    save_projection: bool


@dataclass(frozen=True)
class Groups:
    """Which layer has which number, and so which vector."""

    file: AdapterFile
    settings: Settings
    modules: tuple[str, ...]
    vectors: Mapping[str, str]  # group's number → key

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Module → its number in the order of the base's modules. AdapterError without a base, or for a module that
        it does not have."""
        if self.file.base is None:
            raise self.file.refuse(
                "which layer has which of the trained vectors follows from the order of the base's layers",
                expected="the base beside the adapter",
            )
        order = {n: i for i, n in enumerate(self.file.base.layers(self.file.config))}
        unknown = next((n for n in self.modules if n not in order), None)
        if unknown is not None:
            raise self.file.refuse(
                "the model has no such module, and the order of its modules decides what belongs to which",
                tensor=unknown,
                expected="the base that the adapter was trained on, of the class that its configuration names",
            )
        return {n: i for i, n in enumerate(sorted(self.modules, key=lambda n: order[n]))}

    @property
    def count(self) -> int:
        return max(1, round(len(self.modules) * (1.0 - self.settings.weight_tying)))

    def number(self, module: str) -> str:
        """Of the module's group."""
        size = max(1, len(self.modules) // self.count)
        return str(min(self.numbers[module] // size, self.count - 1))


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims the vectors."""
    settings, adapted = file.settings(Settings), modules(file, _A, _B, _P)
    if not adapted:
        return []
    groups = _groups(file, settings, tuple(module.name for module in adapted))
    extra = next((module for module in adapted if _P in module.keys and not settings.save_projection), None)
    if extra is not None:
        raise file.refuse(
            "save_projection is false, but the file holds a projection, which PEFT would not use",
            tensor=extra.name,
            expected="save_projection: true, or a file without tinylora_P",
        )
    claims = tuple(groups.vectors.values())
    return [_update(module, groups, claims if module is adapted[0] else ()) for module in adapted]


def _groups(file: AdapterFile, settings: Settings, names: tuple[str, ...]) -> Groups:
    tying, size = settings.weight_tying, settings.u
    vectors = {k.removeprefix(_VECTORS): k for k in file.tensors if k.startswith(_VECTORS)}
    if not 0 <= tying <= 1:
        raise file.refuse(f"weight_tying is {tying:g}", expected="a share from 0 to 1")
    groups = Groups(file, settings, names, vectors)
    wanted = {str(i) for i in range(groups.count)}
    # A group that the rounding leaves without a layer has no vector.
    wrong = next((k for k in vectors.values() if file.tensors[k].shape != (size,)), None)
    if wrong or not vectors or not vectors.keys() <= wanted:
        raise file.refuse(
            f"{len(vectors)} vectors for {len(names)} layers, weight_tying is {tying:g} and u {size}",
            tensor=wrong,
            expected=f"vectors tinylora_v.0 to tinylora_v.{groups.count - 1} of {size} numbers",
        )
    return groups


def _update(module: AdaptedModule, groups: Groups, claims: tuple[str, ...]) -> TargetUpdate:
    file, size = module.file, groups.settings.u
    module.need(_A, _B)
    a, b = module.shape(_A), module.shape(_B)
    rank = min(groups.settings.r, a[-1], b[0])
    matrices = len(a) == len(b) == 2 and a[0] == b[1] == rank
    if not matrices or (_P in module.keys and module.shape(_P) != (size, rank, rank)):
        raise module.disagree(f"A ({rank}, in), B (out, {rank}) and P ({size}, {rank}, {rank})")
    if file.base is not None and groups.number(module.name) not in groups.vectors:
        raise file.refuse("the vector of this layer is missing", tensor=module.name, expected=_VECTORS + "…")

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        vector, layer = file.read(groups.vectors[groups.number(module.name)]), module.layer()
        projections = module.read(_P) if _P in module.keys else drawn(groups, module.name, rank)
        turn = torch.einsum("i,ijk->jk", vector, projections.to(vector.dtype))
        # PEFT adds to what an embedding looked up after the base layer's own factor, without that factor.
        right = module.read(_A) / (layer.scale if layer else 1.0)
        return LowRankUpdate.of(module.read(_B) @ turn, right, file.weight, module.is_conv1d)

    used, shapes = (*module.used, *claims), module.stored(b[0], a[1])
    return TargetUpdate(module.weight, "tinylora", used, shapes, load, adds=True, low_rank=True)


def drawn(groups: Groups, module: str, rank: int) -> torch.Tensor:
    """P of shape (u, r, r) as PEFT draws it for this layer: normal, of the variance 1/r."""
    seed, size = groups.settings.projection_seed + groups.numbers[module], (groups.settings.u, rank, rank)
    return torch.normal(
        mean=0.0, std=1.0 / rank**0.5, size=size, generator=torch.Generator(device="cpu").manual_seed(seed)
    )
