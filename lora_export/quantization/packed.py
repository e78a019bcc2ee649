"""Small integers packed into int32 words, lowest bits first, as GPTQ, AWQ and compressed-tensors store them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def unpack(words: "torch.Tensor", bits: int, order: Sequence[int] | None = None) -> "torch.Tensor":
    """int32 (…, n) → int32 (…, n · 32/bits), unsigned; order[p] is the place of the p-th value of a word.

    Where bits does not divide 32, values run on from word to word: 32 of them lie in `bits` words.
    """
    import torch

    if 32 % bits:
        return _unpack_stream(words, bits)
    count = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    if order is not None:
        values = values[..., torch.argsort(torch.tensor(order))]
    return values.reshape(*words.shape[:-1], words.shape[-1] * count)


def _unpack_stream(words: "torch.Tensor", bits: int) -> "torch.Tensor":
    import torch

    at = torch.arange(32) * bits
    runs = words.reshape(*words.shape[:-1], words.shape[-1] // bits, bits).long() & 0xFFFFFFFF
    following = torch.cat((runs[..., 1:], torch.zeros_like(runs[..., :1])), -1)  # what a value runs on into
    both = runs | (following << 32)  # the sign is shifted in from above, and masked away below
    values = (both[..., at // 32] >> (at % 32)) & ((1 << bits) - 1)
    return values.to(torch.int32).reshape(*words.shape[:-1], words.shape[-1] // bits * 32)


def strided(packed: "torch.Tensor", bits: int, rows: "torch.Tensor", count: int, low_first: bool) -> "torch.Tensor":
    """int32 codes (n, columns) of `rows` of a matrix whose row r lies in word r mod height, at place r // height.

    packed: (height, columns) whole numbers that hold `count` rows each; low_first: place 0 has the lowest bits.
    """
    import torch

    place = rows // len(packed)
    shift = bits * (place if low_first else count - 1 - place)
    words = packed[rows % len(packed)].to(torch.int32)
    return (words >> shift[:, None].to(torch.int32)) & ((1 << bits) - 1)


def folder_of(source: TensorSource) -> Path:
    """Where the checkpoint lies, for what config.json alone tells."""
    folder: Path = getattr(source, "folder")  # noqa: B009 - of a Checkpoint; tensors alone have none
    return folder


def part(
    source: TensorSource, weight: str, name: str, dtypes: Sequence[str], dimensions: int | None = 2
) -> TensorInfo:
    """The header of a tensor that a quantized weight needs; CheckpointError if it is missing or of another type.

    dimensions: how many it has, None for any number.
    """
    info = source.tensors.get(name)
    if info is None:
        owner = next(t for n, t in source.tensors.items() if n.startswith(weight.removesuffix("weight")))
        raise CheckpointError(
            f"the tensor {name} is missing",
            where=owner.file,
            tensor=weight,
            expected="all parts of a quantized weight",
        )
    if info.dtype not in dtypes:
        raise CheckpointError(
            f"the type is {info.dtype}", where=info.file, tensor=name, expected=" or ".join(dtypes)
        )
    if dimensions is not None and len(info.shape) != dimensions:
        raise CheckpointError(
            f"the shape is {list(info.shape)}", where=info.file, tensor=name, expected=f"{dimensions} dimensions"
        )
    return info


def expect(info: TensorInfo, shape: Sequence[int]) -> None:
    """Refuse a part of another shape."""
    if info.shape != tuple(shape):
        raise CheckpointError(
            f"the shape is {list(info.shape)}", where=info.file, tensor=info.name, expected=str(list(shape))
        )


def check_groups(groups: "torch.Tensor", count: int, info: TensorInfo) -> None:
    """Refuse an input that belongs to a group which is not there. groups: the values of the tensor `info`."""
    if bool(((groups < 0) | (groups >= count)).any()):
        raise CheckpointError(
            f"an input belongs to a group beyond the {count} there are", where=info.file, tensor=info.name
        )


def groups_of(columns: int, group_size: int) -> int:
    """How many groups of inputs there are; −1 is one group for all."""
    return 1 if group_size == -1 else math.ceil(columns / group_size)
