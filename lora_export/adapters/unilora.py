"""Uni-LoRA (arXiv:2506.00799, eq. 4): W' = W + B·A, every number of A and B one of a single vector θ, scaled.

Which one is drawn for all adapted layers together, in the order of the model, unless it was saved. Each number of θ
is divided by the root of how often it is taken, which PEFT rounds to the type of the base that it loaded: here, and
for a base in fp32, it is fp32.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora_export.adapters.config import whole
from lora_export.adapters.kind import AdapterFile, Layer
from lora_export.adapters.lora import LowRank, LowRankUpdate
from lora_export.adapters.parts import Layered, integers, layered, linear_shapes
from lora_export.adapters.targeting import targeted
from lora_export.contracts import TargetUpdate
from lora_export.storage.documents import is_kind

if TYPE_CHECKING:
    import numpy as np
    import torch

NAME = "Uni-LoRA"
PEFT_TYPES = ("UNILORA",)
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

    def of(self, module: str) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """(indices of A (r, in), those of B (out, r), the factor of each number of θ in fp32)."""
        import torch

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


def draw(total: int, length: int, seed: int) -> "np.ndarray[Any, Any]":
    """PEFT's balanced assignment of θ's numbers, int64 (total,): each as often as any other, or once more."""
    import numpy as np

    generator = np.random.default_rng(seed)
    found = np.repeat(np.arange(length), total // length)
    if total % length:
        found = np.concatenate([found, generator.choice(length, size=total % length, replace=False)])
    generator.shuffle(found)
    return found


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims θ. AdapterError if the layers cannot be known."""
    if THETA not in file.tensors:
        return []
    length, rank = whole(file.config, "theta_d_length", file.where), whole(file.config, "r", file.where)
    if file.tensors[THETA].shape != (length,):
        raise file.refuse(
            f"θ has the shape {list(file.tensors[THETA].shape)}, theta_d_length is {length}",
            tensor=THETA,
            expected="one vector of that length",
        )
    found = layered(file, (*_INDICES, *_SCALES))
    if bool(file.config.get("save_indices")) != bool(found):
        raise file.refuse(
            f"save_indices is {file.config.get('save_indices')!r}, the file has indices for {len(found)} layers",
            expected="indices where save_indices is true, and none where it is not",
        )
    updates = [_saved(layer, rank, length) for layer in found] or _drawn(file, rank, length)
    first = updates[0]
    return [replace(first, keys=(*first.keys, THETA)), *updates[1:]]


def _saved(layer: Layered, rank: int, length: int) -> TargetUpdate:
    file = layer.file
    layer.need(*_INDICES, *_SCALES)
    a, b = (layer.shape(m) for m in _INDICES)
    if (
        len(a) != 2
        or len(b) != 2
        or a[0] != rank
        or b[1] != rank
        or (a, b) != tuple(layer.shape(m) for m in _SCALES)
    ):
        raise layer.disagree(*_INDICES, *_SCALES, expected=f"A ({rank}, in) and B (out, {rank}), indices as scales")

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        theta = file.read(THETA)
        right, left = (
            theta[integers(file, layer.keys[i], length)] * layer.read(s)
            for i, s in zip(_INDICES, _SCALES, strict=True)
        )
        return _low_rank(file, layer.name, left, right)

    return _update(file, layer.name, layer.used, b[0], a[1], load)


def _drawn(file: AdapterFile, rank: int, length: int) -> list[TargetUpdate]:
    seed = file.config.get("proj_seed")
    if not is_kind(seed, int) or int(seed or 0) < 0:
        raise file.refuse(f"proj_seed is {seed!r}", expected="the seed of the indices")
    if file.base is None:
        raise file.refuse(
            "which layers it has, and which of its numbers is where, follows from the base's layers "
            "(save_indices is false)",
            expected="the base beside the adapter",
            next_step="give the base: lora-export inspect ADAPTER -b BASE",
        )
    layers = {n: x for n, x in file.base.layers(file.config).items() if x.linear}
    sizes = {name: (rank, *_sides(layers[name])) for name in targeted(file, layers)}
    drawn = Drawn(length, int(seed or 0), sizes)
    if not 0 < drawn.total <= _MOST:
        raise file.refuse(
            f"target_modules names {len(sizes)} linear layers of this base, {drawn.total} numbers at rank {rank}",
            expected=f"at least one layer, and at most {_MOST} numbers",
        )

    def loading(name: str) -> Any:
        def load(_: tuple[int, ...]) -> LowRankUpdate:
            theta, (a, b, factors) = file.read(THETA), drawn.of(name)
            scaled = theta * factors.to(theta.dtype)
            return _low_rank(file, name, scaled[b], scaled[a])

        return load

    return [_update(file, name, (), outs, ins, loading(name)) for name, (_, ins, outs) in sizes.items()]


def _sides(layer: Layer) -> tuple[int, int]:
    """(inputs, outputs)."""
    rows, columns = layer.shape
    return (rows, columns) if layer.conv1d else (columns, rows)


def _low_rank(file: AdapterFile, name: str, left: "torch.Tensor", right: "torch.Tensor") -> LowRankUpdate:
    if file.is_conv1d(name):
        left, right = right.T, left.T
    return LowRankUpdate(LowRank(left, right, file.weight))


def _update(
    file: AdapterFile, name: str, keys: tuple[str, ...], outputs: int, inputs: int, load: Any
) -> TargetUpdate:
    shapes = linear_shapes(file, name, outputs, inputs)
    # No factors to combine as LoRA's: they are not in the file.
    return TargetUpdate(f"{name}.weight", "unilora", keys, shapes, load, adds=True)
