"""Rotations of outputs: OFT (arXiv:2306.07280) of LyCORIS' diag-oft and of sd-scripts, and LyCORIS' BOFT
(arXiv:2311.06243).

Q = B − Bᵀ of each block; alpha is no scale but a constraint: the norm of all Q together is at most alpha times the
number of outputs, where alpha is above 0. R = (I + Q)·(I − Q)⁻¹. OFT takes Rᵀ·W of each block of rows, BOFT R·W.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.diffusion.kinds.module import Trained, Whole
from lora_export.adapters.diffusion.pieces import Shape
from lora_export.adapters.oft import cayley

if TYPE_CHECKING:
    import torch

COPIES = (
    14  # in fp32: what was read, and in float64 the weight, its permutation, the product and its absolute value
)
_ZERO = 1e-8  # LyCORIS adds it to a norm before it compares


@dataclass(frozen=True)
class RowRotation:
    """blocks: float64 (factors, blocks, s, s), each multiplied from the left with s rows; scales: one for each row.

    butterfly: the two halves of each group of 2ⁱ·s rows are interleaved before factor i, and parted after it.
    Whatever the weight's type, it is computed in float64. Rows may be given that are whole groups of
    s·2^(factors−1).
    """

    blocks: "torch.Tensor"
    scales: "torch.Tensor | None"
    butterfly: bool

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        size, matrix = self.blocks.shape[-1], weight.double().flatten(1)
        mine = slice(rows.start // size, rows.start // size + len(matrix) // size)
        for factor, blocks in enumerate(self.blocks):
            half = 2**factor * size // 2
            if self.butterfly:
                matrix = _swapped(matrix, 2, half)
            matrix = (blocks[mine] @ matrix.reshape(-1, size, matrix.shape[1])).reshape(matrix.shape)
            if self.butterfly:
                matrix = _swapped(matrix, half, 2)
        if self.scales is not None:
            matrix = matrix * self.scales[rows.start : rows.start + len(matrix), None].double()
        return matrix.reshape(weight.shape).to(weight.dtype)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: all arithmetic between them is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()


def _swapped(matrix: "torch.Tensor", outer: int, inner: int) -> "torch.Tensor":
    """Row (i, j) of each group of outer × inner rows goes to (j, i)."""
    return matrix.reshape(-1, outer, inner, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def read_oft(trained: Trained) -> list[Whole]:
    """oft_blocks: (n, s, s), or with the factors of BOFT (m, n, s, s); rescale: (out, 1, …)."""
    import torch

    shape = trained.shape("oft_blocks")
    if len(shape) not in (3, 4) or shape[-2] != shape[-1] or 0 in shape:
        raise trained.disagree("(n, s, s), or (m, n, s, s) for BOFT", "oft_blocks")
    butterfly = len(shape) == 4
    factors, count, size = (shape[0] if butterfly else 1), *shape[-3:-1]
    if butterfly and (size % 2 or count % 2 ** (factors - 1)):
        raise trained.disagree(f"blocks of an even size, their number a multiple of 2^{factors - 1}", "oft_blocks")
    name, outputs = "BOFT" if butterfly else "OFT", count * size
    trained.file.refuse_weight(name, trained.module.keys["oft_blocks"])
    if trained.has("rescale"):
        rows, *ones = trained.shape("rescale") or (0,)
        if rows != outputs or any(n != 1 for n in ones):
            raise trained.disagree("a factor (out, 1, …) for each row of all blocks", "rescale", "oft_blocks")

    def load(_: Shape) -> RowRotation:
        blocks = _blocks(trained.read("oft_blocks").double(), (trained.module.alpha or 0.0) * outputs)
        # R is orthogonal, so its transpose is what −Q gives.
        rotations = torch.stack([cayley(-q) for q in blocks]) if butterfly else cayley(blocks)[None]
        scales = trained.read("rescale").reshape(-1) if trained.has("rescale") else None
        return RowRotation(rotations, scales, butterfly)

    parts = ("oft_blocks", "rescale", "alpha")
    return [
        Whole(
            name.lower(), parts, outputs, trained.stored("weight")[1:], load, row_wise=False, copies=COPIES,
            grain=size * 2 ** (factors - 1),
        )
    ]  # fmt: skip


def _blocks(raw: "torch.Tensor", limit: float) -> "torch.Tensor":
    """The skew-symmetric blocks, of a norm that is at most the limit if there is one (above 0)."""
    import torch

    skew = raw - raw.mT
    norm = float(torch.linalg.vector_norm(skew)) + _ZERO
    return skew * (limit / norm) if 0 < limit < norm else skew
