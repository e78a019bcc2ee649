"""PSOFT (Wu et al., ICLR 2026, eq. 6): W' = W + U·√S·(R − I)·√S·Vᵀ in the r largest singular directions of W.

The factors are not saved: PEFT decomposes the base again, in fp32, whenever it loads the adapter. The sign of a
pair of singular vectors is free, and R mixes pairs, so the signs must be those of PEFT's own call: it is made here,
too, and its fp32 factors are what the trained R belongs to.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from lora_export.adapters.config import Count, Number, Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.oft import cayley, check_terms, neumann, skew_symmetric
from lora_export.adapters.updates import DECOMPOSITION, ExactUpdate, WholeTarget
from lora_export.contracts import TargetUpdate

NAME = "PSOFT"
FORMULA = "W + U·S·(R − I)·Vᵀ in the r largest singular directions of W"

_R, _B, _A = "psoft_R", "psoft_R.vector_b", "psoft_R.vector_a"
_MOST_ITERATIONS = 1000


@dataclass(frozen=True)
class Settings:
    """psoft_alpha is read, but α/r scales the factors down and the delta up again. pissa_init: √S on both sides of
    R, psoft_init: all of S on U's. The last two are for lowrank alone."""

    r: Positive
    psoft_alpha: Number
    ab_svd_init: Literal["psoft_init", "pissa_init"]
    psoft_svd: Literal["full", "lowrank"]
    psoft_orth: bool
    psoft_mag_b: bool
    psoft_mag_a: bool
    use_cayley_neumann: bool
    num_cayley_neumann_terms: Positive | None = None
    cayley_neumann_eps: Number | None = None
    psoft_svd_lowrank_niter: Count | None = None
    random_seed: int | None = None


@dataclass(frozen=True)
class Subspace:
    """How the r largest singular directions are found. iterations: of the randomized method, None for a whole SVD;
    seed: of its random matrix; shared: √S on both sides of R, or all of S on U's."""

    rank: int
    iterations: int | None
    seed: int
    shared: bool

    def factors(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B (out, r) and A (r, in) in float64, of PEFT's fp32 decomposition of weight (out, in)."""
        single = weight.float()
        if self.iterations is None:
            u, sizes, v = torch.linalg.svd(single, full_matrices=False)
        else:
            u, sizes, v = randomized(single, self.rank, self.iterations, self.seed)
        u, sizes, v = u[:, : self.rank].double(), sizes[: self.rank].double(), v[: self.rank].double()
        if self.shared:
            return u * sizes.sqrt(), sizes.sqrt()[:, None] * v
        return u * sizes, v


@dataclass(frozen=True)
class SubspaceUpdate(ExactUpdate):
    """W + B·(R − I)·A; turn: R, fp32 (r, r). The decomposition is in fp32."""

    turn: torch.Tensor
    subspace: Subspace

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        b, a = self.subspace.factors(weight)
        eye = torch.eye(len(self.turn), dtype=torch.float64, device=weight.device)
        return weight + b @ ((self.turn.double() - eye) @ a)


def randomized(
    weight: torch.Tensor, rank: int, iterations: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Algorithm 5.1 of arXiv:0909.4061 as torch.svd_lowrank computes it after torch.manual_seed(seed); U, S, Vᵀ.

    With a generator of its own, for the global one belongs to all threads.
    """
    wide = weight.shape[0] < weight.shape[1]
    matrix = weight.mT if wide else weight
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = torch.randn(matrix.shape[1], rank, generator=generator, dtype=weight.dtype).to(weight.device)
    basis = torch.linalg.qr(matrix @ drawn).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, sizes, v = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    u = basis @ u
    return (v.mT, sizes, u.mT) if wide else (u, sizes, v)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. Every setting of R and of the decomposition is read, or refused."""
    file.refuse_weight(NAME)
    settings = file.settings(Settings)
    if settings.use_cayley_neumann:
        check_terms(file, settings.num_cayley_neumann_terms)
    subspace = _subspace(file, settings)
    return [_update(module, settings, subspace) for module in modules(file, _R, _B, _A)]


def _subspace(file: AdapterFile, settings: Settings) -> Subspace:
    shared = settings.ab_svd_init == "pissa_init"
    if settings.psoft_svd == "full":
        return Subspace(settings.r, None, 0, shared)
    iterations, seed = settings.psoft_svd_lowrank_niter, settings.random_seed
    if iterations is None or seed is None or iterations > _MOST_ITERATIONS:
        raise file.refuse(
            f"psoft_svd_lowrank_niter is {iterations!r}, random_seed {seed!r}",
            expected="the iterations and the seed of the decomposition, as PEFT 0.21 writes them",
        )
    return Subspace(settings.r, iterations, seed, shared)


def _update(module: AdaptedModule, settings: Settings, subspace: Subspace) -> TargetUpdate:
    vectors = [m for m, present in ((_B, settings.psoft_mag_b), (_A, settings.psoft_mag_a)) if present]
    module.need(_R, *vectors)
    rank, orthogonal = subspace.rank, settings.psoft_orth
    expected = (rank * (rank - 1) // 2,) if orthogonal else (rank, rank)
    shaped = module.shape(_R) == expected and all(module.shape(m) == (rank,) for m in vectors)
    if not shaped or module.keys.keys() != {_R, *vectors}:
        raise module.disagree(f"R of shape {list(expected)}, {' and '.join(vectors) or 'no vector'} of {rank}")

    def load(shape: tuple[int, ...]) -> SubspaceUpdate:
        stored = module.read(_R)
        turn = _orthogonal(stored, settings) if orthogonal else stored.double()
        if _B in vectors:
            turn = module.read(_B).double()[:, None] * turn
        if _A in vectors:
            turn = turn * module.read(_A).double()
        return SubspaceUpdate(turn.to(stored.dtype), subspace)

    return WholeTarget(module.weight, "psoft", module.used, ((None, None),), load, copies=DECOMPOSITION)


def _orthogonal(upper: torch.Tensor, settings: Settings) -> torch.Tensor:
    """R (r, r), float64: (I + Q)(I − Q)⁻¹, or its series, of the skew-symmetric Q that `upper` is above the
    diagonal of."""
    skew = skew_symmetric(upper[None], settings.r)
    if not settings.use_cayley_neumann:
        return cayley(-skew)[0]
    norm, limit = float(torch.linalg.matrix_norm(skew)[0]), settings.cayley_neumann_eps
    if limit is not None and norm > limit:
        skew = skew * (limit / (norm + 1e-12))
    return neumann(skew, settings.num_cayley_neumann_terms or 1)[0]
