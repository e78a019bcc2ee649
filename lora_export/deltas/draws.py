"""DARE's random choice of elements (arXiv:2311.03099, eq. 1), the same however a tensor is cut into blocks.

Philox (Salmon et al., SC 2011) makes the i-th number from a key and i alone. The key is of the seed, of the
tensor's name and of the adapter's place, so each tensor can be drawn by any thread, in blocks of any size.
"""

import hashlib
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PER_COUNT = 8  # 32-bit numbers that Philox makes of one value of its counter
_RANGE = 2.0**32


def drawn(seed: int, name: str, which: int, density: float, start: int, shape: tuple[int, ...]) -> "torch.Tensor":
    """Which elements stay: true with the probability `density`, for rows of a tensor from its element `start` on.

    which: the place of the adapter among those that are combined.
    """
    import numpy as np
    import torch

    key = int.from_bytes(hashlib.blake2b(f"{seed}/{which}/{name}".encode(), digest_size=16).digest(), "little")
    count, skip = prod(shape), start % _PER_COUNT
    source = np.random.Philox(key=key, counter=start // _PER_COUNT)
    numbers = source.random_raw(-(-(skip + count) // 2)).view(np.uint32)[skip : skip + count]
    return torch.from_numpy(numbers < density * _RANGE).reshape(shape)
