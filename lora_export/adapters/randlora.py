"""RandLoRA (arXiv:2502.00987, eq. 4): W' = W + s·Σ Bₙ·Λₙ·A·Γₙ, B and A random and shared by all layers."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.complete import complete
from lora_export.adapters.config import number, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import LowRank, LowRankUpdate
from lora_export.contracts import TargetUpdate
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

NAME = "RandLoRA"
PEFT_TYPES = ("RANDLORA",)
FORMULA = "W + (alpha/r)·B·(λ ⊙ A ⊙ γ), so many random bases that the delta has full rank; B and A shared"

_SCALES = ("randlora_lambda", "randlora_gamma")
_SHARED = ("randlora_A", "randlora_B")
COPIES = 14  # in fp32: the rank is full, so the factors, the bases and their copies are as large as the weight


@dataclass(frozen=True)
class SmallSideTarget(TargetUpdate):
    """A matrix whose smaller side is known, and which is no wider than the shared bases (None: unknown)."""

    smaller: int = 0
    widest: int | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        narrow = self.widest is None or max(shape, default=0) <= self.widest
        return super().fits(shape) and min(shape) == self.smaller and narrow


@functools.lru_cache(maxsize=1)
def regenerate(
    seed: int, rank: int, smaller: int, larger: int, sparsity: float | None
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """A (r, 1, smaller) and B (larger, bases, r) as PEFT draws them: A first, then B.

    Dense (sparsity None): uniform with the bound 1/√(last size), in bfloat16, B base by base. Sparse: −1 and 1,
    each with the probability 1/(2·sparsity). Both are divided by their standard deviation, in the type they have.
    """
    import torch

    generator, bases = torch.Generator(device="cpu").manual_seed(seed), -(-smaller // rank)

    def uniform(*shape: int) -> "torch.Tensor":
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / 6.0) / math.sqrt(shape[-1]))
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

    if sparsity is None:
        a = uniform(rank, 1, smaller)
        b = torch.cat([uniform(larger, 1, rank) for _ in range(bases)], dim=1)
    else:
        a = _signs(torch.rand((rank, 1, smaller), generator=generator), 1 / (2 * sparsity))
        b = _signs(torch.rand((larger, bases, rank), generator=generator), 1 / (2 * sparsity))
    return a / a.std(), b / b.std()


def _signs(drawn: "torch.Tensor", share: float) -> "torch.Tensor":
    """−1 for the lowest share of numbers from 0 to 1, 1 for the highest, 0 between."""
    return (drawn > 1 - share).float() - (drawn < share).float()


@dataclass(frozen=True)
class Bases:
    """The shared pair: whether the file has it, or what it is drawn from again (sizes None: no base is known).

    PEFT saves it once for the model and once more for each layer, as it is part of all of them.
    """

    file: AdapterFile
    rank: int
    smaller: int | None
    larger: int | None
    saved: bool
    seed: int = 0
    sparsity: float | None = None

    def of(self, module: str) -> tuple["torch.Tensor", "torch.Tensor"]:
        """A and B for one layer. AdapterError if its own copy is another one: PEFT would take the last it reads."""
        import torch

        if not self.saved:
            if self.smaller is None or self.larger is None:
                raise _unknown(self.file, module)
            sparsity = math.sqrt(self.smaller) if self.file.config.get("very_sparse") else self.sparsity
            return regenerate(self.seed, self.rank, self.smaller, self.larger, sparsity)
        found = []
        for name in _SHARED:
            found.append(self.file.read(name))
            copy = f"{module}.{name}"
            if copy in self.file.tensors and not torch.equal(self.file.read(copy), found[-1]):
                raise self.file.refuse(
                    f"this copy of {name} differs from the one of the model", tensor=copy, expected="equal copies"
                )
        return found[0], found[1]

    def claimed(self, module: str, first: bool) -> tuple[str, ...]:
        """The keys that the update of this layer claims."""
        copies = (f"{module}.{name}" for name in _SHARED if f"{module}.{name}" in self.file.tensors)
        return (*copies, *(_SHARED if first else ())) if self.saved else ()


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims the shared bases, where they were saved."""
    modules = complete(file, _SCALES)
    if not modules:
        return []
    found = [n for n in _SHARED if n in file.tensors]
    shared = _saved(file, found) if file.config.get("save_projection", True) else _drawn(file, found, modules)
    first = next(iter(modules))
    return [_update(shared, name, keys, shared.claimed(name, name == first)) for name, keys in modules.items()]


def _saved(file: AdapterFile, found: list[str]) -> Bases:
    if len(found) != len(_SHARED):
        raise file.refuse(
            "save_projection is set, but randlora_A and randlora_B are not both there",
            expected="both bases in the file",
            next_step="save the adapter again: model.save_pretrained(DIR)",
        )
    rank = whole(file.config, "r", file.where)
    a, b = (file.shape(n, 3) for n in _SHARED)
    if (a[0], a[1], b[2]) != (rank, 1, rank):
        raise file.refuse(
            f"randlora_A has the shape {list(a)}, randlora_B {list(b)}, and r is {rank}",
            tensor=_SHARED[0],
            expected="(r, 1, smaller side) and (larger side, bases, r)",
        )
    return Bases(file, rank, min(a[2], b[1] * rank), b[0], True)


def _drawn(file: AdapterFile, found: list[str], modules: Mapping[str, Mapping[str, str]]) -> Bases:
    if found:
        raise file.refuse(
            "save_projection is false, but the file holds a projection, which PEFT would not use",
            tensor=found[0],
            expected="save_projection: true, or a file without randlora_A and randlora_B",
        )
    seed = file.config.get("projection_prng_key")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise file.refuse(f"projection_prng_key is {seed!r}", expected="the seed of randlora_A and randlora_B")
    rank, sparsity = whole(file.config, "r", file.where), 3.0 if file.config.get("sparse") else None
    if not file.base_shapes:
        return Bases(file, rank, None, None, False, seed, sparsity)
    sizes = []
    for name in modules:
        shape = file.base_shape(f"{name}.weight")
        if shape is None or len(shape) != 2:
            raise _unknown(file, name)
        sizes.append(shape[::-1] if file.is_conv1d(name) else shape)
    largest = [max(s[axis] for s in sizes) for axis in (0, 1)]
    if rank > min(largest):
        raise file.refuse(f"r is {rank}, more than a layer has inputs", expected=f"at most {min(largest)}")
    return Bases(file, rank, min(largest), max(largest), False, seed, sparsity)


def _unknown(file: AdapterFile, module: str) -> AdapterError:
    return file.refuse(
        "the bases were not saved (save_projection is false), and to draw them again takes the largest sizes of "
        "all layers, which the adapter does not tell",
        tensor=module,
        expected="the base that it was trained on, or an adapter with randlora_A and randlora_B",
    )


def _update(shared: Bases, name: str, keys: dict[str, str], claimed: tuple[str, ...]) -> TargetUpdate:
    file, rank = shared.file, shared.rank
    used = tuple(keys[p] for p in _SCALES)
    scales, gains = (file.shape(k, 2) for k in used)
    bases, smaller = gains
    if scales != (rank, bases) or bases != -(-smaller // rank) or smaller > (shared.smaller or smaller):
        raise file.refuse(
            f"randlora_lambda has the shape {list(scales)}, randlora_gamma {list(gains)}, and r is {rank}",
            tensor=used[0],
            expected="(r, bases) and (bases, smaller side), as many bases as make the rank full",
        )
    scaling = file.weight * number(file.config, "randlora_alpha", file.where) / rank

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        a, b = shared.of(name)
        factors, gamma = (file.read(k) for k in used)
        a, b = a[:, :, :smaller].to(factors.dtype), b[: max(shape), :bases].to(factors.dtype)
        # PEFT flattens one of them as (r, bases) and the other as (bases, r), and multiplies them as they are.
        small, large = (factors[:, :, None] * a * gamma).flatten(0, 1), b.flatten(1)
        height, width = reversed(shape) if (flip := file.is_conv1d(name)) else shape
        left, right = (large, small) if width <= height else (small.T, large.T)
        if flip:
            left, right = right.T, left.T
        return LowRankUpdate(LowRank(left, right, scaling))

    def whole_only(_: tuple[int, ...]) -> bool:
        return False

    return SmallSideTarget(
        f"{name}.weight", "randlora", (*used, *claimed), ((None, None),), load, row_wise=whole_only, copies=COPIES,
        adds=True, low_rank=True, smaller=smaller, widest=shared.larger,
    )  # fmt: skip
