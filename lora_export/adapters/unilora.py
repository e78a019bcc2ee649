"""Uni-LoRA (arXiv:2506.00799, eq. 4): W' = W + B·A, every number of A and B one of a single vector θ, scaled.

Which one is drawn for all adapted layers together, in the order of the model, unless it was saved. Each number of θ
is divided by the root of how often it is taken, which PEFT rounds to the type of the base that it loaded: here, and
for a base in fp32, it is fp32.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lora_export.adapters.config import Count, Positive
from lora_export.adapters.kind import AdapterFile, Layer
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.targeting import targeted
from lora_export.adapters.updates import LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "Uni-LoRA"
FORMULA = "W + B·A, every number of A and B a scaled one of a shared vector θ"

THETA = "unilora_theta_d"
_INDICES = ("unilora_indices_A", "unilora_indices_B")
_SCALES = ("unilora_scales_A", "unilora_scales_B")
_MOST = 2**31  # numbers of A and B of all layers: each takes eight bytes


@dataclass
class Drawn:
    """The numbers of θ for all layers, drawn when the first of them is asked for.

    sizes: module → (r, inputs, outputs), in the order of the model.
    """

    length: int
    seed: int
    sizes: dict[str, tuple[int, int, int]]
    _indices: Any = None
    _factors: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        return sum(rank * (inputs + outputs) for rank, inputs, outputs in self.sizes.values())

    def of(self, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(indices of A (r, in), those of B (out, r), the factor of each number of θ in fp32)."""
        with self._lock:
            if self._indices is None:
                self._indices = draw(self.total, self.length, self.seed)
                counts = torch.bincount(torch.from_numpy(self._indices), minlength=self.length)
                self._factors = torch.where(counts > 0, counts.float().rsqrt(), 0.0)
        start = 0
        for name, (rank, inputs, outputs) in self.sizes.items():
            middle, end = start + rank * inputs, start + rank * (inputs + outputs)
            if name == module:
                a, b = self._indices[start:middle].reshape(rank, inputs), self._indices[middle:end]
                return torch.from_numpy(a), torch.from_numpy(b.reshape(outputs, rank)), self._factors
            start = end
        raise KeyError(module)


def draw(total: int, length: int, seed: int) -> np.ndarray[Any, Any]:
    """PEFT's balanced assignment of θ's numbers, int64 (total,): each as often as any other, or once more."""
    generator = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(length), total // length)
    if total % length:
        numbers = np.concatenate([numbers, generator.choice(length, size=total % length, replace=False)])
    generator.shuffle(numbers)
    return numbers


@dataclass(frozen=True)
class Settings:
    """proj_seed: of the indices, where save_indices is not set."""

    theta_d_length: Positive
    r: Positive
    save_indices: bool | None = None
    proj_seed: Count | None = None


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims θ. AdapterError if the layers cannot be known."""
    if THETA not in file.tensors:
        return []
    settings = file.settings(Settings)
    if file.tensors[THETA].shape != (settings.theta_d_length,):
        raise file.refuse(
            f"θ has the shape {list(file.tensors[THETA].shape)}, theta_d_length is {settings.theta_d_length}",
            tensor=THETA,
            expected="one vector of that length",
        )
    adapted = modules(file, *_INDICES, *_SCALES)
    if bool(settings.save_indices) != bool(adapted):
        raise file.refuse(
            f"save_indices is {settings.save_indices!r}, the file has indices for {len(adapted)} layers",
            expected="indices where save_indices is true, and none where it is not",
        )
    first, *others = [_saved(module, settings) for module in adapted] or _drawn(file, settings)
    return [replace(first, keys=(*first.keys, THETA)), *others]


def _saved(module: AdaptedModule, settings: Settings) -> TargetUpdate:
    module.need(*_INDICES, *_SCALES)
    (a, b), scales, rank = (module.shape(m) for m in _INDICES), tuple(module.shape(m) for m in _SCALES), settings.r
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank or (a, b) != scales:
        raise module.disagree(f"A ({rank}, in) and B (out, {rank}), indices as scales")

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        theta = module.file.read(THETA)
        right, left = (
            theta[module.indices(i, settings.theta_d_length)] * module.read(s)
            for i, s in zip(_INDICES, _SCALES, strict=True)
        )
        return LowRankUpdate.of(left, right, module.file.weight, module.is_conv1d)

    return _update(module, b[0], a[1], load)


def _drawn(file: AdapterFile, settings: Settings) -> list[TargetUpdate]:
    rank, seed = settings.r, settings.proj_seed
    if seed is None:
        raise file.refuse(f"proj_seed is {seed!r}", expected="the seed of the indices")
    if file.base is None:
        raise file.refuse(
            "which layers the adapter has, and where each of its numbers goes, follows from the base's layers "
            "(save_indices is false)",
            expected="the base beside the adapter",
            next_step="give the base: lora-export inspect ADAPTER -b BASE",
        )
    layers = {n: x for n, x in file.base.layers(file.config).items() if x.linear}
    sizes = {name: (int(rank), *_sides(layers[name])) for name in targeted(file, layers)}
    drawn = Drawn(settings.theta_d_length, seed, sizes)
    if not 0 < drawn.total <= _MOST:
        raise file.refuse(
            f"target_modules names {len(sizes)} linear layers of this base, {drawn.total} numbers at rank {rank}",
            expected=f"at least one layer, and at most {_MOST} numbers",
        )

    def update(module: AdaptedModule, inputs: int, outputs: int) -> TargetUpdate:
        def load(_: tuple[int, ...]) -> LowRankUpdate:
            theta, (a, b, factors) = file.read(THETA), drawn.of(module.name)
            scaled = theta * factors.to(theta.dtype)
            return LowRankUpdate.of(scaled[b], scaled[a], file.weight, module.is_conv1d)

        return _update(module, outputs, inputs, load)

    return [update(AdaptedModule(file, name, {}), ins, outs) for name, (_, ins, outs) in sizes.items()]


def _sides(layer: Layer) -> tuple[int, int]:
    """(inputs, outputs)."""
    rows, columns = layer.shape
    return (rows, columns) if layer.conv1d else (columns, rows)


def _update(
    module: AdaptedModule, outputs: int, inputs: int, load: Callable[[tuple[int, ...]], LowRankUpdate]
) -> TargetUpdate:
    # It is not `low_rank`: factors that are not in the file are not combined as LoRA's are.
    return TargetUpdate(module.weight, "unilora", module.used, module.stored(outputs, inputs), load, adds=True)
