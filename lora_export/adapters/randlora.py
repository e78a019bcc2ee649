"""RandLoRA (arXiv:2502.00987, eq. 4): W' = W + s·Σ Bₙ·Λₙ·A·Γₙ, B and A random and shared by all layers."""

import functools
import math
from dataclasses import dataclass

import torch

from lora_export.adapters.config import Number, Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import SAVE_AGAIN, AdaptedModule, complete
from lora_export.adapters.updates import LowRankUpdate, never
from lora_export.contracts import TargetUpdate
from lora_export.errors import AdapterError

NAME = "RandLoRA"
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, 1, smaller) and B (larger, bases, r) as PEFT draws them: A first, then B.

    Dense (sparsity None): uniform with the bound 1/√(last size), in bfloat16, B base by base. Sparse: −1 and 1,
    each with the probability 1/(2·sparsity). Both are divided by their standard deviation, in the type they have.
    """
    generator, bases = torch.Generator(device="cpu").manual_seed(seed), -(-smaller // rank)

    def uniform(*shape: int) -> torch.Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / 6.0) / math.sqrt(shape[-1]))
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

    if sparsity is None:
        a = uniform(rank, 1, smaller)
        b = torch.cat([uniform(larger, 1, rank) for _ in range(bases)], dim=1)
    else:
        a = _signs(torch.rand((rank, 1, smaller), generator=generator), 1 / (2 * sparsity))
        b = _signs(torch.rand((larger, bases, rank), generator=generator), 1 / (2 * sparsity))
    return a / a.std(), b / b.std()


def _signs(drawn: torch.Tensor, share: float) -> torch.Tensor:
    """−1 for the lowest share of numbers from 0 to 1, 1 for the highest, 0 between."""
    return (drawn > 1 - share).float() - (drawn < share).float()


@dataclass(frozen=True)
class Settings:
    """projection_prng_key: the seed of the bases, where they were not saved; very_sparse and sparse: how they are
    drawn then."""

    r: Positive
    randlora_alpha: Number
    save_projection: bool = True
    projection_prng_key: int | None = None
    sparse: bool = False
    very_sparse: bool = False


@dataclass(frozen=True)
class Bases:
    """The shared pair: whether the file has it, or what it is drawn from again (sizes None: no base is known).

    PEFT saves it once for the model and once more for each layer, as it is part of all of them.
    """

    file: AdapterFile
    settings: Settings
    smaller: int | None
    larger: int | None

    def of(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B for one layer. AdapterError if its own copy is another one: PEFT would take the last it reads."""
        if not self.settings.save_projection:
            if self.smaller is None or self.larger is None:
                raise _unknown(self.file, module)
            sparsity = 3.0 if self.settings.sparse else None
            sparsity = math.sqrt(self.smaller) if self.settings.very_sparse else sparsity
            seed = self.settings.projection_prng_key or 0
            return regenerate(seed, self.settings.r, self.smaller, self.larger, sparsity)
        pair = [self.file.read(name) for name in _SHARED]
        for name, value in zip(_SHARED, pair, strict=True):
            copy = f"{module}.{name}"
            if copy in self.file.tensors and not torch.equal(self.file.read(copy), value):
                raise self.file.refuse(
                    f"this copy of {name} differs from the one of the model", tensor=copy, expected="equal copies"
                )
        return pair[0], pair[1]

    def claimed(self, module: str, first: bool) -> tuple[str, ...]:
        """The keys that the update of this layer claims."""
        copies = (f"{module}.{name}" for name in _SHARED if f"{module}.{name}" in self.file.tensors)
        return (*copies, *(_SHARED if first else ())) if self.settings.save_projection else ()


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims the shared bases, where they were saved."""
    settings, adapted = file.settings(Settings), complete(file, *_SCALES)
    if not adapted:
        return []
    shared = (_saved if settings.save_projection else _drawn)(file, settings, adapted)
    return [_update(module, shared, shared.claimed(module.name, module is adapted[0])) for module in adapted]


def _saved(file: AdapterFile, settings: Settings, adapted: list[AdaptedModule]) -> Bases:
    if any(name not in file.tensors for name in _SHARED):
        raise file.refuse(
            "save_projection is set, but randlora_A and randlora_B are not both there",
            expected="both bases in the file",
            next_step=SAVE_AGAIN,
        )
    rank, (a, b) = settings.r, (file.shape(n, 3) for n in _SHARED)
    if (a[0], a[1], b[2]) != (rank, 1, rank):
        raise file.refuse(
            f"randlora_A has the shape {list(a)}, randlora_B {list(b)}, and r is {rank}",
            tensor=_SHARED[0],
            expected="(r, 1, smaller side) and (larger side, bases, r)",
        )
    return Bases(file, settings, min(a[2], b[1] * rank), b[0])


def _drawn(file: AdapterFile, settings: Settings, adapted: list[AdaptedModule]) -> Bases:
    held = next((n for n in _SHARED if n in file.tensors), None)
    if held:
        raise file.refuse(
            "save_projection is false, but the file holds a projection, which PEFT would not use",
            tensor=held,
            expected="save_projection: true, or a file without randlora_A and randlora_B",
        )
    if settings.projection_prng_key is None:
        raise file.refuse("projection_prng_key is None", expected="the seed of randlora_A and randlora_B")
    if not file.base_shapes:
        return Bases(file, settings, None, None)
    sizes = []
    for module in adapted:
        shape = file.base_shape(module.weight)
        if shape is None or len(shape) != 2:
            raise _unknown(file, module.name)
        sizes.append(shape[::-1] if module.is_conv1d else shape)
    largest = [max(s[axis] for s in sizes) for axis in (0, 1)]
    if settings.r > min(largest):
        problem = f"r is {settings.r}, more than a layer has inputs"
        raise file.refuse(problem, expected=f"at most {min(largest)}")
    return Bases(file, settings, min(largest), max(largest))


def _unknown(file: AdapterFile, module: str) -> AdapterError:
    return file.refuse(
        "the bases were not saved (save_projection is false), and drawing them again needs the largest sizes of "
        "all layers, which the adapter does not record",
        tensor=module,
        expected="the base that it was trained on, or an adapter with randlora_A and randlora_B",
    )


def _update(module: AdaptedModule, shared: Bases, claimed: tuple[str, ...]) -> TargetUpdate:
    file, rank = module.file, shared.settings.r
    scales, (bases, smaller) = (file.shape(k, 2) for k in module.used)
    if scales != (rank, bases) or bases != -(-smaller // rank) or smaller > (shared.smaller or smaller):
        raise module.disagree(
            "(r, bases) and (bases, smaller side), as many bases as make the rank full", also=f"r is {rank}"
        )
    scaling = file.weight * shared.settings.randlora_alpha / rank

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        a, b = shared.of(module.name)
        factors, gamma = (module.read(p) for p in _SCALES)
        a, b = a[:, :, :smaller].to(factors.dtype), b[: max(shape), :bases].to(factors.dtype)
        # PEFT flattens one of them as (r, bases) and the other as (bases, r), and multiplies them as they are.
        small, large = (factors[:, :, None] * a * gamma).flatten(0, 1), b.flatten(1)
        height, width = reversed(shape) if (flip := module.is_conv1d) else shape
        left, right = (large, small) if width <= height else (small.T, large.T)
        return LowRankUpdate.of(left, right, scaling, flip)

    return SmallSideTarget(
        module.weight, "randlora", (*module.used, *claimed), ((None, None),), load, row_wise=never, copies=COPIES,
        adds=True, low_rank=True, smaller=smaller, widest=shared.larger,
    )  # fmt: skip
