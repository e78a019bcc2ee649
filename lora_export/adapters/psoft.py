"""PSOFT (Wu et al., ICLR 2026, eq. 6): W' = W + U·√S·(R − I)·√S·Vᵀ in the r largest singular directions of W.

The factors are not saved: PEFT decomposes the base again, in fp32, whenever it loads the adapter. The sign of a
pair of singular vectors is free, and R mixes pairs, so the signs must be those of PEFT's own call: it is made here,
too, and its fp32 factors are what the trained R belongs to.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.adapters.config import number, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import DECOMPOSITION
from lora_export.adapters.oft import MOST_TERMS, cayley, neumann
from lora_export.adapters.parts import Layered, layered, one_of
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "PSOFT"
PEFT_TYPES = ("PSOFT",)
FORMULA = "W + U·S·(R − I)·Vᵀ in the r largest singular directions of W"

_R, _B, _A = "psoft_R", "psoft_R.vector_b", "psoft_R.vector_a"
_MOST_ITERATIONS = 1000


@dataclass(frozen=True)
class Subspace:
    """How the r largest singular directions are found. iterations: of the randomized method, None for a whole SVD;
    seed: of its random matrix; shared: √S on both sides of R, or all of S on U's."""

    rank: int
    iterations: int | None
    seed: int
    shared: bool

    def factors(self, weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """B (out, r) and A (r, in) in float64, of PEFT's fp32 decomposition of weight (out, in)."""
        import torch

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
class SubspaceUpdate:
    """W + B·(R − I)·A; turn: R, fp32 (r, r). All rows together, in float64 from the factors on."""

    turn: "torch.Tensor"
    subspace: Subspace

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        b, a = self.subspace.factors(weight)
        eye = torch.eye(len(self.turn), dtype=torch.float64, device=weight.device)
        changed: torch.Tensor = weight.double() + b @ ((self.turn.double() - eye) @ a)
        return changed.to(weight.dtype)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: between the factors and the result all is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()


def randomized(
    weight: "torch.Tensor", rank: int, iterations: int, seed: int
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Algorithm 5.1 of arXiv:0909.4061 as torch.svd_lowrank computes it after torch.manual_seed(seed); U, S, Vᵀ.

    With a generator of its own, for the global one belongs to all threads.
    """
    import torch

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
    found = layered(file, (_R, _B, _A))
    if not found:
        return []
    file.refuse_weight(NAME)
    number(file.config, "psoft_alpha", file.where)  # α/r scales the factors down and the delta up again
    subspace, terms, limit = _subspace(file), _terms(file), _limit(file)
    orthogonal = one_of(file, "psoft_orth", (True, False))
    vectors = [m for m, key in ((_B, "psoft_mag_b"), (_A, "psoft_mag_a")) if one_of(file, key, (True, False))]
    return [_update(layer, subspace, orthogonal, vectors, terms, limit) for layer in found]


def _subspace(file: AdapterFile) -> Subspace:
    rank = whole(file.config, "r", file.where)
    shared = one_of(file, "ab_svd_init", ("psoft_init", "pissa_init")) == "pissa_init"
    if one_of(file, "psoft_svd", ("full", "lowrank")) == "full":
        return Subspace(rank, None, 0, shared)
    iterations, seed = file.config.get("psoft_svd_lowrank_niter"), file.config.get("random_seed")
    known = isinstance(iterations, int) and isinstance(seed, int) and 0 <= iterations <= _MOST_ITERATIONS
    if not known or isinstance(iterations, bool) or isinstance(seed, bool):
        raise file.refuse(
            f"psoft_svd_lowrank_niter is {iterations!r}, random_seed {seed!r}",
            expected="the iterations and the seed of the decomposition, as PEFT 0.21 writes them",
        )
    return Subspace(rank, int(iterations or 0), int(seed or 0), shared)


def _terms(file: AdapterFile) -> int | None:
    if not one_of(file, "use_cayley_neumann", (True, False)):
        return None
    terms = whole(file.config, "num_cayley_neumann_terms", file.where)
    if terms > MOST_TERMS:
        raise file.refuse(f"num_cayley_neumann_terms is {terms}", expected=f"at most {MOST_TERMS} terms")
    return terms


def _limit(file: AdapterFile) -> float | None:
    return (
        number(file.config, "cayley_neumann_eps", file.where)
        if file.config.get("cayley_neumann_eps") is not None
        else None
    )


def _update(
    layer: Layered, subspace: Subspace, orthogonal: bool, vectors: list[str], terms: int | None, limit: float | None
) -> TargetUpdate:
    layer.need(_R, *vectors)
    rank = subspace.rank
    expected = (rank * (rank - 1) // 2,) if orthogonal else (rank, rank)
    if (
        layer.shape(_R) != expected
        or layer.keys.keys() != {_R, *vectors}
        or any(layer.shape(m) != (rank,) for m in vectors)
    ):
        raise layer.disagree(
            *layer.keys, expected=f"R of shape {list(expected)}, {' and '.join(vectors) or 'no vector'} of {rank}"
        )

    def load(shape: tuple[int, ...]) -> SubspaceUpdate:
        turn: Any = layer.read(_R)
        kind = turn.dtype
        turn = _orthogonal(turn, rank, terms, limit) if orthogonal else turn.double()
        if _B in vectors:
            turn = layer.read(_B).double()[:, None] * turn
        if _A in vectors:
            turn = turn * layer.read(_A).double()
        return SubspaceUpdate(turn.to(kind), subspace)

    return TargetUpdate(
        f"{layer.name}.weight",
        "psoft",
        layer.used,
        ((None, None),),
        load,
        row_wise=lambda _: False,
        copies=DECOMPOSITION,
    )


def _orthogonal(upper: "torch.Tensor", size: int, terms: int | None, limit: float | None) -> "torch.Tensor":
    """R (r, r), float64: (I + Q)(I − Q)⁻¹, or its series, of the skew-symmetric Q that `upper` is above the
    diagonal of."""
    import torch

    skew = torch.zeros(1, size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[0, rows, columns] = upper.double()
    skew = skew - skew.mT
    if terms is None:
        return cayley(-skew)[0]
    norm = float(torch.linalg.matrix_norm(skew)[0])
    if limit is not None and norm > limit:
        skew = skew * (limit / (norm + 1e-12))
    return neumann(skew, terms)[0]
