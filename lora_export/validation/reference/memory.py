"""Whether both models fit into memory, and what may be kept of them where they do not."""

from math import prod
from pathlib import Path

import psutil
from safetensors import safe_open

# Unmerged, merged, and the adapted weights once more while the noise floor changes them.
COPIES = 3
# The largest weight of each model while it is compared: as it is stored, in fp32, and a block of rows.
WORKING = 3


def kept_bytes(merged: Path, max_memory: int | None) -> int | None:
    """None if the models fit in fp32; else how many bytes of weights each of them may keep between uses.

    max_memory: bytes for weights, None for half of what the machine has available. What the libraries, the adapters
    and the outputs take comes on top.
    """
    sizes = _sizes(merged)
    limit = psutil.virtual_memory().available // 2 if max_memory is None else max_memory
    if COPIES * sum(sizes) <= limit or not sizes:
        return None
    return max(0, limit - WORKING * max(sizes)) // 2


def _sizes(folder: Path) -> list[int]:
    """Bytes in fp32 of every tensor of the safetensors files, from their headers."""
    sizes = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            sizes += [4 * prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    return sizes
