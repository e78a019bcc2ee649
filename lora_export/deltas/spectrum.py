"""Singular values and vectors of a delta, and what follows from them. All in float64.

Of factors B·A they come from QR of both and an SVD of r × r; of a matrix from the eigenvectors of its smaller Gram
matrix, which is ten times as fast as its SVD and gives singular values to 1e-8 of the largest.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spectrum:
    """left: (rows, k), right: (k, columns), sizes: (k,), falling: left·diag(sizes)·right is the delta.

    total: ‖Δ‖², which sizes² add up to.
    """

    left: "torch.Tensor"
    sizes: "torch.Tensor"
    right: "torch.Tensor"

    @cached_property
    def energy(self) -> "torch.Tensor":
        """Share of ‖Δ‖² that the first 1, 2, … singular values have, (k,); ones for a delta of zero."""
        import torch

        squares = self.sizes.square().cumsum(0)
        if not len(squares) or not squares[-1] > 0:
            return torch.ones_like(self.sizes)
        return squares / squares[-1]

    def rank_for(self, share: float) -> int:
        """The least rank that keeps so much of ‖Δ‖²; at least 1."""
        return min(len(self.sizes), int((self.energy < share * (1 - 2.0**-40)).sum()) + 1) if len(self.sizes) else 0

    def lost(self, rank: int) -> float:
        """‖Δ − Δ_rank‖: the norm of the singular values beyond it (Eckart and Young, 1936)."""
        return float(self.sizes[rank:].square().sum().sqrt())

    def factors(self, rank: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """(B, A) with B·A = Δ_rank and the same norm for both; (rows, rank) and (rank, columns)."""
        root = self.sizes[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]

    @property
    def norm(self) -> float:
        return float(self.sizes.square().sum().sqrt())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ (Roy and Vetterli, EUSIPCO 2007); 0 for a delta of zero."""
        total = self.sizes.sum()
        if not total > 0:
            return 0.0
        shares = self.sizes / total
        shares = shares[shares > 0]
        return float((-(shares * shares.log()).sum()).exp())

    @property
    def stable_rank(self) -> float:
        """‖Δ‖²/σ₁² (Rudelson and Vershynin, 2007); 0 for a delta of zero."""
        return float(self.sizes.square().sum() / self.sizes[0].square()) if self.norm > 0 else 0.0


def of_factors(left: "torch.Tensor", right: "torch.Tensor") -> Spectrum:
    """Of left·right, (rows, r) and (r, columns)."""
    import torch

    q, upper = torch.linalg.qr(left.double())
    p, lower = torch.linalg.qr(right.double().T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    k = len(sizes)
    return Spectrum(q @ u[:, :k], sizes, v[:k] @ p.T)


def of_matrix(delta: "torch.Tensor") -> Spectrum:
    """Of a matrix, with as many singular values as its smaller side."""
    import torch

    matrix = delta.double()
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    _squares, vectors = torch.linalg.eigh(wide @ wide.T)
    vectors = vectors.flip(1)
    along = vectors.T @ wide  # its rows are σ times the right vectors, so their norms are exact where σ² is not
    sizes = torch.linalg.norm(along, dim=1)
    order = sizes.argsort(descending=True)
    sizes, vectors, along = sizes[order], vectors[:, order], along[order]
    right = along / sizes.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return Spectrum(right.T, sizes, vectors.T) if tall else Spectrum(vectors, sizes, right)
