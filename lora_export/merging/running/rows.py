"""A planned tensor's numbers: rows of the base before the adapter, and the updates with all that they hold."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_export.adapters.kind import float64
from lora_export.adapters.updates import rebuilt
from lora_export.contracts import RowReader, TensorSource, Update
from lora_export.merging.planning.plan import PlannedTensor

if TYPE_CHECKING:
    import torch

Reader = Callable[[int, int], "torch.Tensor"]  # of rows [start, stop)


def base_rows(
    tensor: PlannedTensor,
    packed: RowReader | None,
    start: int,
    stop: int,
    raw: Callable[[int, memoryview], None] | None = None,
) -> "torch.Tensor":
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
        return packed.rows(start, stop)
    assert info is not None
    block = info.rows(start, stop)
    if raw is not None:
        raw(start * info.row_nbytes, block.reshape(-1).view(torch.uint8).numpy().data)
    return block if tensor.training is None else tensor.training.round_trip(block)


def _resized(shape: Sequence[int], stored: Sequence[int], start: int, stop: int, old: Reader) -> "torch.Tensor":
    """Rows [start, stop) of a weight that was resized: what is stored, cut, and zeros where it has nothing."""
    import torch

    have = old(start, min(stop, stored[0])) if start < stored[0] else torch.zeros((0, *stored[1:]))
    rows = torch.zeros((stop - start, *shape[1:]), dtype=have.dtype)
    cut = tuple(slice(0, min(a, b)) for a, b in zip(shape[1:], stored[1:], strict=True))
    rows[(slice(0, len(have)), *cut)] = have[(slice(None), *cut)]
    return rows


def whole_base(tensor: PlannedTensor, base: TensorSource) -> "torch.Tensor":
    """The base's weight before the adapter, float64."""
    packed = tensor.quantized.load(base) if tensor.quantized else None
    return base_rows(tensor, packed, 0, tensor.height).double()


def load_updates(tensor: PlannedTensor, wide: bool) -> list[Update]:
    """The updates of a tensor with all their numbers in fp32, or in float64."""
    if not wide:
        return [u.load(tensor.shape) for u in tensor.updates]
    with float64():
        loaded: list[Update] = [u.load(tensor.shape) for u in tensor.updates]
    return [rebuilt(u, _double) for u in loaded]


def _double(part: Any) -> Any:
    """What an update holds besides what it read, such as the projections that VeRA draws."""
    import torch

    return part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part


def moved(update: Any, device: str) -> Any:
    """The same update with its tensors on another device, whatever it is made of."""
    return rebuilt(update, lambda part: part if isinstance(part, float) else part.to(device))


def change_of(updates: Sequence[Update], before: "torch.Tensor", rows: slice) -> "torch.Tensor":
    """What updates together make of these rows of the base, less the rows."""
    after = before.clone()
    for update in updates:
        after = update.apply(after, rows).reshape(before.shape)
    return after - before
