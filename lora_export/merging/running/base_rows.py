"""Rows of a base's weight, before the adapter: stored, dequantized, or of another size than the base has."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_export.checkpoint.reader import read_rows
from lora_export.merging.planning.plan import PlannedTensor

if TYPE_CHECKING:
    import torch

Reader = Callable[[int, int], "torch.Tensor"]  # of rows [start, stop)


def base_rows(tensor: PlannedTensor, packed: Any, start: int, stop: int, raw: Any = None) -> "torch.Tensor":
    """Rows of the base as a merge takes them, before the adapter: in fp32, or as they are stored.

    packed: the quantized weight, loaded; raw: is given the first byte's place and the bytes that were read.
    """
    import torch

    info = tensor.source
    stored = tensor.quantized.shape if tensor.quantized else info.shape if info is not None else None
    if stored is None or (stored != tensor.shape and any(u.replaces for u in tensor.updates)):
        return torch.zeros((stop - start, *tensor.shape[1:]), dtype=torch.float32)  # no old rows enter
    if stored != tensor.shape:
        old = partial(base_rows, replace(tensor, shape=stored), packed)
        return _resized(tensor.shape, stored, start, stop, old)
    if packed is not None:
        rows: torch.Tensor = packed.rows(start, stop)
        return rows
    assert info is not None
    block = read_rows(info, start, stop)
    if raw is not None:
        raw(start * (info.nbytes // (info.shape or (1,))[0]), block.reshape(-1).view(torch.uint8).numpy().data)
    return block if tensor.training is None else tensor.training.round_trip(block)


def _resized(shape: Sequence[int], stored: Sequence[int], start: int, stop: int, old: Reader) -> "torch.Tensor":
    """Rows [start, stop) of a weight that was resized: what is stored, cut, and zeros where it has nothing."""
    import torch

    have = old(start, min(stop, stored[0])) if start < stored[0] else torch.zeros((0, *stored[1:]))
    rows = torch.zeros((stop - start, *shape[1:]), dtype=have.dtype)
    cut = tuple(slice(0, min(a, b)) for a, b in zip(shape[1:], stored[1:], strict=True))
    rows[(slice(0, len(have)), *cut)] = have[(slice(None), *cut)]
    return rows
