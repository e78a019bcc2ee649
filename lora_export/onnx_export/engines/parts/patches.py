"""Vision towers that get the patches of all pictures in one row, as Qwen's do: what follows from their grids.

transformers lets a caller bring what it would compute with loops over the grids. Here it is computed for each patch
from the grid of its picture, so that one graph serves all sizes. Attention is masked instead of split.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.onnx_export.engines.dynamo_passes import attention

_NAME = "onnxruntime_flash"  # the name decides that transformers leaves the pieces of the row to the operator
_PLAIN = "plain_flash"


@dataclass(frozen=True)
class _Places:
    """For each patch: the index of the first patch of its frame, its row and column, and its picture's size."""

    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor

    @classmethod
    def of(cls, count: int, grids: torch.Tensor, merge: int) -> "_Places":
        """Patches are in the order of blocks of merge × merge, which become one token."""
        index = torch.arange(count)
        counts = grids.prod(1)
        ends = counts.cumsum(0)
        picture = (index[:, None] >= ends[None]).sum(1)
        height, width = grids[picture, 1], grids[picture, 2]
        start = (ends - counts)[picture]
        inside = (index - start) % (height * width)
        blocks = width // merge
        block = inside // (merge * merge)
        row = block // blocks * merge + inside // merge % merge
        column = block % blocks * merge + inside % merge
        return cls(index - inside, row, column, height, width)

    def windows(self, side: int, merge: int) -> torch.Tensor:
        """The index of the first patch of each patch's window, which has `side` blocks along an edge."""
        row, column = self.row // (merge * side) * side, self.column // (merge * side) * side
        return self.frame + (row * (self.width // merge) + column) * (merge * merge)


def known(tower: Any, pixels: torch.Tensor, grids: torch.Tensor) -> dict[str, Any]:
    """What the tower's forward takes instead of computing it. pixels: (patches, values); grids: (pictures, 3).

    Pieces of the row are given by a number for each patch, not by their ends.
    """
    merge, count = tower.spatial_merge_size, pixels.shape[0]
    places = _Places.of(count, grids, merge)
    given: dict[str, Any] = {
        "position_ids": torch.stack([places.row, places.column], -1),
        "cu_seqlens": places.frame,
        "max_seqlen": 1,
    }
    if hasattr(tower, "fullatt_block_indexes"):
        side = tower.window_size // merge // tower.patch_size
        given["window_index"] = torch.arange(count // (merge * merge))
        given |= {"cu_window_seqlens": places.windows(side, merge), "max_window_seqlen": 1}
    if hasattr(tower, "num_grid_per_side"):
        given["interp_indices"], given["interp_weights"] = _resampled(tower, places)
    return given


def _resampled(tower: Any, places: _Places) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a patch finds its place in the square of learned positions, and with which weights: (patches, taps)."""
    from transformers.vision_utils import _interpolation_axis_taps_weights as taps_of

    side = tower.num_grid_per_side
    how = side, tower.interpolation_mode, tower.interpolation_align_corners
    rows, row_weights = taps_of(places.row, places.height, *how)
    columns, column_weights = taps_of(places.column, places.width, *how)
    indices = rows[:, :, None] * side + columns[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return indices.flatten(1), weights.flatten(1)


@contextlib.contextmanager
def together(tower: Any) -> Iterator[None]:
    """Inside, the tower's attention gets the whole row, and the numbers of `known`."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _fused)
    AttentionInterface.register(_PLAIN, _unfused)
    before = tower.config._attn_implementation
    tower.config._attn_implementation = _NAME if before == attention.NAME else _PLAIN
    try:
        yield
    finally:
        tower.config._attn_implementation = before


def _fused(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
    cu_seq_lens_q: torch.Tensor, scaling: float, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    return attention.attention(module, query, key, value, _bias(cu_seq_lens_q, query.dtype), scaling)


def _unfused(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
    cu_seq_lens_q: torch.Tensor, scaling: float, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    scores = query @ key.transpose(2, 3) * scaling + _bias(cu_seq_lens_q, query.dtype)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def _bias(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(1, 1, patches, patches): a patch sees those of its own piece."""
    return torch.where(piece[:, None] == piece[None], 0.0, attention.HIDDEN).to(dtype)[None, None]
