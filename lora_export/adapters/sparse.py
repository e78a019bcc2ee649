"""Deltas that are zero but for some elements: where they are, and how they are added to blocks of rows."""

from dataclasses import dataclass

import numpy as np
import torch

_SHUFFLE_32 = (2**32 - 1) // 20  # torch.randperm draws 32 bits at a time for fewer elements than this
_ENTRIES = 2**21  # of all patches, that are added at once


@dataclass(frozen=True)
class SparseUpdate:
    """weight[rows[i], columns[i]] += values[i]. rows, columns: int64 (n,); values: fp32 (n,)."""

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        here = (self.rows >= rows.start) & (self.rows < rows.stop)
        places = (self.rows[here] - rows.start, self.columns[here])
        return weight.index_put_(places, self.values[here], accumulate=True)


@dataclass(frozen=True)
class PatchUpdate:
    """Outer products that are added where they lie; what reaches beyond the weight is left out.

    tops, lefts: int64 (n,), where the first element of each lies, maybe outside; down: fp32 (n, height); across:
    fp32 (n, width), the factors of the patches.
    """

    tops: torch.Tensor
    lefts: torch.Tensor
    down: torch.Tensor
    across: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        (_, height), (_, width) = self.down.shape, self.across.shape
        near = (self.tops > rows.start - height) & (self.tops < rows.stop)
        for some in torch.split(near.nonzero()[:, 0], max(1, _ENTRIES // (height * width))):
            down = self.tops[some, None] + torch.arange(height, device=weight.device) - rows.start
            across = self.lefts[some, None] + torch.arange(width, device=weight.device)
            patches = self.down[some, :, None] * self.across[some, None, :]
            row = down[:, :, None].expand(-1, -1, width)
            column = across[:, None, :].expand(-1, height, -1)
            inside = (row >= 0) & (row < len(weight)) & (column >= 0) & (column < weight.shape[1])
            weight.index_put_((row[inside], column[inside]), patches[inside], accumulate=True)
        return weight

    def terms(self, weight: torch.Tensor, terms: torch.Tensor, rows: slice) -> torch.Tensor:
        """The same patches without their signs. Places keep theirs: a patch may begin outside of the weight."""
        return PatchUpdate(self.tops, self.lefts, self.down.abs(), self.across.abs()).apply(terms, rows)


def first_permuted(seed: int, total: int, count: int) -> torch.Tensor:
    """The first `count` of torch.randperm(total) on the CPU with this seed, int64, without making the others.

    A shuffle of Fisher and Yates: its first elements are final after as many steps. Each step takes 32 bits of
    the Mersenne Twister, modulo what is left.
    """
    if total >= _SHUFFLE_32:
        return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    drawn = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, count, dtype=np.uint32)
    moved: dict[int, int] = {}
    places = []
    for place, bits in enumerate(drawn.tolist()):
        other = place + bits % (total - place)
        places.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return torch.tensor(places, dtype=torch.int64)
