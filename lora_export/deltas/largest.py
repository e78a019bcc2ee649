"""The size from which on an element is among the k largest of a delta that is never whole in memory.

A first pass counts sizes by the upper half of their bits in float32, a second looks at those that share the bits of
the k-th. The answer lies halfway between the k-th and the next, or a hair below the k-th where the next has other
bits, so that sums in another order, which move both by 1e-16 of themselves, choose the same elements.
Sizes within a hair of each other count as equal: FourierFT's waves have each size twice, but for rounding.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_export.storage.workers import cores

if TYPE_CHECKING:
    import torch

Runs = Sequence[tuple[int, int]]
Blocks = Callable[[int, int], "torch.Tensor"]

_LOW = 15  # bits of a float32 that a first pass leaves out
_LEVELS = ((_LOW, 2**16), (0, 2**_LOW))  # shift, and how many keys there are
FEW = 2**22  # numbers that may be sorted at a time
_HAIR = 2.0**-40


def least_kept(blocks: Blocks, runs: Runs, kept: int, total: int) -> float:
    """Elements of at least this size are `kept` of all `total`, or more where several are as large as the least.

    blocks(start, stop): rows of the delta, float64; runs: rows that cover it.
    """
    if kept >= total:
        return 0.0
    if kept <= 0:
        return float("inf")
    prefix, above = 0, 0
    with ThreadPoolExecutor(cores()) as pool:
        for shift, width in _LEVELS:
            look = partial(_counts, blocks, shift=shift, prefix=prefix, width=width)
            prefix, above, inside = _holding(sum(pool.map(look, runs)), kept, above, prefix, shift)
            if inside <= FEW:
                return _between(list(pool.map(partial(_inside, blocks, shift, prefix), runs)), kept - above)
    return _value(prefix) * (1 - 2.0**-24)  # so many are as large as each other, as far as float32 can tell


def _keys(block: "torch.Tensor") -> "torch.Tensor":
    """Bits of the absolute values as float32: their order is that of the values."""
    import torch

    return block.abs().float().reshape(-1).view(torch.int32)


def _counts(blocks: Blocks, run: tuple[int, int], shift: int, prefix: int, width: int) -> "torch.Tensor":
    """How many elements have each key; in a second pass, of those with the first pass's key alone."""
    import torch

    keys = _keys(blocks(*run))
    if shift == 0:
        keys = keys[keys >> _LOW == prefix] & (width - 1)
    return torch.bincount(keys >> shift, minlength=width)


def _holding(counts: Any, kept: int, above: int, prefix: int, shift: int) -> tuple[int, int, int]:
    """(the key of the k-th largest, how many have a larger one, how many have it)."""
    from_top = counts.flip(0).cumsum(0) + above
    at = int((from_top < kept).sum())
    key = len(counts) - 1 - at
    inside = int(counts[key])
    return (key if shift else prefix << _LOW | key), int(from_top[at]) - inside, inside


def _inside(blocks: Blocks, shift: int, prefix: int, run: tuple[int, int]) -> "torch.Tensor":
    block = blocks(*run)
    return block.abs().reshape(-1)[_keys(block) >> shift == prefix]


def _between(blocks: Sequence["torch.Tensor"], kept: int) -> float:
    """Halfway between the `kept` largest of these numbers and the next of them, if there is one."""
    import torch

    ordered = torch.cat(list(blocks)).sort(descending=True).values
    least = float(ordered[kept - 1])
    following = float(ordered[kept]) if kept < len(ordered) else least
    return min((least + following) / 2, least * (1 - _HAIR))


def _value(bits: int) -> float:
    import torch

    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
