"""OFT (arXiv:2306.07280, on the input's side as in arXiv:2506.19847): W' = W·Rᵀ, R orthogonal, in blocks."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import Number, Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, Shapes, modules
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "OFT"
FORMULA = "W·Rᵀ, an embedding's W·R; R = diag(Cayley transforms of skew-symmetric blocks)"

ROTATION = "oft_R"
EMBEDDING_ROTATION = "oft_embedding_R"
MOST_TERMS = 1000  # each is a product of matrices; PEFT's default is 5
_OLD = ("oft_r", "oft_s")
# PEFT's truncated series became another one in this version, which is also the first to write peft_version.
SERIES_SINCE = (0, 18)


@dataclass(frozen=True)
class Rotations:
    """How the blocks are made from the file's numbers.

    terms: terms of the Cayley-Neumann series, None for the exact Cayley transform; limit: the largest norm that
    all blocks of a layer may have together (COFT), None without; shared: one block for the whole layer.
    """

    terms: int | None
    limit: float | None
    shared: bool

    def blocks(self, upper: "torch.Tensor", size: int) -> "torch.Tensor":
        """upper: (blocks, size·(size−1)/2), the entries above the diagonal, row by row. → (blocks, size, size).

        In float64: the result is rounded once, by whoever multiplies with it.
        """
        import torch

        skew = skew_symmetric(upper, size)
        if self.limit is not None:
            norms = torch.linalg.matrix_norm(skew, keepdim=True)
            share = self.limit / math.sqrt(len(upper))
            skew = torch.where(norms <= share, skew, skew * (share / norms))
        return cayley(skew) if self.terms is None else neumann(skew, self.terms)


def skew_symmetric(upper: "torch.Tensor", size: int) -> "torch.Tensor":
    """(blocks, size, size) in float64 from the entries above each diagonal, (blocks, size·(size−1)/2)."""
    import torch

    skew = torch.zeros(len(upper), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = upper.double()
    return skew - skew.mT


def cayley(skew: "torch.Tensor") -> "torch.Tensor":
    """(I − Q)(I + Q)⁻¹ for skew-symmetric Q of shape (blocks, n, n): orthogonal blocks."""
    import torch

    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    solved: torch.Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return solved


def neumann(skew: "torch.Tensor", terms: int) -> "torch.Tensor":
    """I + 2Q + 2Q² + … + 2Qᵗ⁻² + Qᵗ⁻¹ with t terms, as PEFT counts them since 0.18.

    This approaches (I + Q)(I − Q)⁻¹, the inverse of what `cayley` gives for the same Q. The powers 1 and 2 have
    the factor 2 whenever they occur, so 2 terms are I + 2Q, and 3 terms are what 4 are.
    """
    import torch

    total = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        last = max(terms, 4) - 1
        power = skew
        for exponent in range(2, last + 1):
            power = power @ skew
            total = total + (power if exponent == last else 2 * power)
    return total


def rotate(matrix: "torch.Tensor", blocks: "torch.Tensor") -> "torch.Tensor":
    """matrix · diag(blocks)ᵀ without the zeros; matrix (rows, blocks·n), blocks (blocks or 1, n, n)."""
    size = blocks.shape[-1]
    parts = matrix.reshape(len(matrix), -1, size).transpose(0, 1)
    return (parts @ blocks.mT).transpose(0, 1).reshape(matrix.shape)


@dataclass(frozen=True)
class RotationUpdate:
    """W·diag(blocks)ᵀ. Each row is rotated for itself. blocks: fp32 (blocks, n, n), one block if shared."""

    blocks: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return rotate(weight.flatten(1), self.blocks).reshape(weight.shape)


@dataclass(frozen=True)
class RotationTarget(TargetUpdate):
    """A weight whose inputs come in blocks of `size`; the number of blocks is open where they share one."""

    file: AdapterFile | None = None
    size: int = 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """As for any update. AdapterError for a convolution that is wider than one pixel."""
        if len(shape) == 4 and shape[2:] != (1, 1) and self.file is not None:
            raise self.file.refuse(
                f"OFT on a convolution of {shape[2]}×{shape[3]} pixels: PEFT adds up the rotated patches where "
                "they overlap, which changes the model even untrained, and no weight of this size equals it",
                tensor=self.target,
                expected="OFT on linear layers, embeddings and convolutions of 1×1",
                next_step="serve it unmerged with PEFT",
            )
        return super().fits(shape) and shape[1] % self.size == 0


@dataclass(frozen=True)
class Settings:
    """eps: the limit of coft."""

    use_cayley_neumann: bool
    coft: bool
    block_share: bool
    num_cayley_neumann_terms: Positive | None = None
    eps: Number | None = None


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each rotated layer. Refused: files of PEFT before 0.16, and series of PEFT before 0.18."""
    for old in modules(file, *_OLD):
        raise file.refuse(
            "an OFT adapter of PEFT before 0.16, whose parameters have another meaning; PEFT can no longer load it",
            tensor=old.used[0],
            expected="tensors such as …q_proj.oft_R.weight",
            next_step="train it again, or merge it with the PEFT that saved it",
        )
    file.refuse_weight(NAME)
    rotations = _rotations(file)
    return [_update(module, rotations) for module in modules(file, ROTATION, EMBEDDING_ROTATION)]


def _rotations(file: AdapterFile) -> Rotations:
    settings = file.settings(Settings)
    terms, limit = settings.num_cayley_neumann_terms, settings.eps
    if settings.use_cayley_neumann and check_terms(file, terms) > 2:
        _refuse_old_series(file)
    if settings.coft and (limit is None or limit < 0):
        raise file.refuse(f"eps is {limit!r}", expected="a limit of at least 0")
    return Rotations(
        terms if settings.use_cayley_neumann else None, limit if settings.coft else None, settings.block_share
    )


def check_terms(file: AdapterFile, terms: int | None) -> int:
    """The terms of a Cayley-Neumann series; AdapterError for none, or too many."""
    if terms is None or terms > MOST_TERMS:
        raise file.refuse(f"num_cayley_neumann_terms is {terms}", expected=f"1 to {MOST_TERMS} terms")
    return terms


def _refuse_old_series(file: AdapterFile) -> None:
    from packaging.version import Version

    saved = file.config.get("peft_version")
    try:
        version = Version(str(saved or "0").partition("@")[0])
    except ValueError:
        raise file.refuse(
            f"peft_version is {saved!r}", expected="a version such as 0.21.2: the Cayley-Neumann series follows it"
        ) from None
    # Builds on the way to 0.18 may have either series.
    if version.release[:2] < SERIES_SINCE or (version.release == (0, 18, 0) and version.is_prerelease):
        raise file.refuse(
            "trained with the Cayley-Neumann series of PEFT before 0.18 (peft_version is "
            f"{saved or 'missing'}), and PEFT now computes a different one",
            expected="an adapter of PEFT 0.18 or newer, or one with use_cayley_neumann=false",
            next_step="merge it with PEFT 0.17.1, or train it again",
        )


def _update(module: AdaptedModule, rotations: Rotations) -> TargetUpdate:
    if len(module.keys) > 1:
        expected = f"one of {', '.join(module.keys)}"
        raise module.file.refuse("two rotations of one layer", tensor=module.name, expected=expected)
    (marker,) = module.keys
    shape, embedding = module.shape(marker), marker == EMBEDDING_ROTATION
    size = _block_size(shape[1]) if len(shape) == 2 else None
    if size is None or shape[0] < 1 or (rotations.shared and shape[0] != 1):
        raise module.disagree(
            "(blocks, n·(n−1)/2) for blocks of n×n, and one block where it is shared",
            also=f"block_share is {str(rotations.shared).lower()}",
        )
    inputs = None if rotations.shared else shape[0] * size
    shapes: Shapes = ((None, inputs),) if embedding else ((None, inputs), (None, inputs, 1, 1))

    def load(_: tuple[int, ...]) -> RotationUpdate:
        upper = module.read(marker)
        blocks = rotations.blocks(upper, size).to(upper.dtype)
        return RotationUpdate(blocks.mT if embedding else blocks)

    kind = "oft_embedding" if embedding else "oft"
    return RotationTarget(module.weight, kind, module.used, shapes, load, file=module.file, size=size)


def _block_size(entries: int) -> int | None:
    """n of a block with n·(n−1)/2 entries above its diagonal; None if there is no such n."""
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    return size if size * (size - 1) // 2 == entries else None
