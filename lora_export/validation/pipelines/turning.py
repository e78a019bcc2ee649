"""OFT and BOFT as turns of a layer's outputs (LyCORIS diag_oft.py and boft.py; sd-scripts oft.py)."""

from collections.abc import Mapping

import torch

from lora_export.errors import AdapterError
from lora_export.validation.pipelines.activations import Rotated, cut


def rotation_of(
    parts: Mapping[str, torch.Tensor], alpha: float, axis: int, rows: slice | None, swap: bool, outputs: int
) -> Rotated:
    """The turn of the outputs of one piece. alpha: the constraint, a share of all outputs, 0 for none; outputs: of
    the piece; the rest as of a Piece.

    AdapterError where the borders of a piece cut through a block, whose outputs cannot be turned apart.
    """
    blocks = parts["oft_blocks"].double()
    total = int(blocks.shape[-3] * blocks.shape[-1])
    rescale = parts["rescale"].flatten().double() if "rescale" in parts else None
    turns = _turns(blocks, alpha * total)
    size = blocks.shape[-1]
    # Of each output of the trained weight: where it is in the base.
    place = torch.argsort(cut(torch.arange(outputs), None, swap, 0))
    if blocks.dim() == 3:  # W' = Rᵀ W
        first, last = (rows.start, rows.stop) if rows is not None else (0, total)
        if first % size or last % size:
            raise AdapterError(
                f"blocks of {size} outputs are cut at {first} and {last}",
                expected="pieces of a fused weight that end where blocks end",
            )
        turns = turns.transpose(-1, -2)[None, first // size : last // size]
        orders = place[None]
    elif rows is None:
        orders = torch.stack([place[_butterfly(outputs, size, stage)] for stage in range(len(blocks))])
    else:
        raise AdapterError("BOFT mixes all outputs of a fused weight", expected="a weight that the base has whole")
    return Rotated(axis, turns, orders, None if rescale is None else cut(rescale, rows, swap, 0))


def _turns(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Cayley's transform of each block. limit: of the norm of all blocks together, 0 for none."""
    skew = blocks - blocks.transpose(-1, -2)
    norm = float(skew.norm())
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    turned: torch.Tensor = torch.linalg.solve((eye - skew).mT, (eye + skew).mT).mT
    return turned


def _butterfly(outputs: int, size: int, stage: int) -> torch.Tensor:
    """Which outputs stand beside each other in a stage: those that lie 2^stage · size/2 apart."""
    apart = 2**stage * (size // 2)
    return torch.arange(outputs).reshape(-1, 2, apart).transpose(1, 2).flatten()
