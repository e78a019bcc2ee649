"""Which tensor goes into which output file, decided before the first byte."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.checkpoint.header import ITEM_BITS, build_header
from lora_export.checkpoint.weight_files import PLAIN, WeightFiles
from lora_export.storage.sealed import write_json


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written; `home` is the base's file that it came from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    home: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    file: str
    header: bytes
    tensors: tuple[OutputTensor, ...]


def plan_shards(
    tensors: Sequence[OutputTensor],
    max_shard_size: int | None,
    metadata: dict[str, str],
    files: WeightFiles = PLAIN,
) -> list[Shard]:
    """Group tensors into files of at most `max_shard_size` bytes, or as the base had them (None); files: how those
    are called."""
    groups = _by_home(tensors) if max_shard_size is None else _by_size(tensors, max_shard_size)
    count = len(groups)
    metadata = {"format": "pt"} | metadata
    return [
        Shard(
            files.single if count == 1 else files.shard(i, count),
            build_header([(t.name, t.dtype, t.shape) for t in group], metadata),
            tuple(group),
        )
        for i, group in enumerate(groups, 1)
    ]


def _by_home(tensors: Sequence[OutputTensor]) -> list[list[OutputTensor]]:
    homes: dict[str, list[OutputTensor]] = {}
    for t in tensors:
        homes.setdefault(t.home, []).append(t)
    return list(homes.values())


def _by_size(tensors: Sequence[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    groups: list[list[OutputTensor]] = []
    room = 0
    for t in tensors:
        if not groups or t.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(t)
        room -= t.nbytes
    return groups


def write_index(folder: Path, shards: Sequence[Shard], files: WeightFiles = PLAIN) -> None:
    """The index.json that transformers and diffusers expect beside more than one shard."""
    if len(shards) > 1:
        total = sum(t.nbytes for s in shards for t in s.tensors)
        weight_map = {t.name: s.file for s in shards for t in s.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / files.index, index)
