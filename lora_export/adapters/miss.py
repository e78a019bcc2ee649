"""MiSS (arXiv:2409.15371), and Bone, its name in PEFT before 0.17: one block D, repeated along the inputs."""

from dataclasses import dataclass
from typing import Literal

import torch

from lora_export.adapters.config import Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, Shapes, complete
from lora_export.adapters.updates import LowRankUpdate, SizedTarget
from lora_export.contracts import TargetUpdate

NAME = "MiSS"
FORMULA = "W + Dᵀ·(I I … I), one block of r inputs repeated; bat: W + (W + I)·D in blocks of r×r"

_MARKERS = {"MISS": "miss_block", "BONE": "bone_block"}


@dataclass(frozen=True)
class BlockAffineUpdate:
    """Each r×r block of a row of blocks becomes block + block·D + D. blocks: fp32 (outputs/r, r, r)."""

    blocks: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        size = self.blocks.shape[-1]
        row = torch.arange(rows.start, rows.start + len(weight), device=weight.device)
        parts = weight.reshape(len(weight), -1, size)
        for owner in torch.unique(row // size).tolist():
            mine = row // size == owner
            block = self.blocks[owner]
            parts[mine] += parts[mine] @ block + block[row[mine] % size, None]
        return parts.reshape(weight.shape)


@dataclass(frozen=True)
class Settings:
    """init_weights decides how the block is used; mini_r: outputs after which mini repeats it."""

    r: Positive
    init_weights: Literal[True, False, "bat", "mini"] = True
    mini_r: Positive | None = None


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each linear layer."""
    file.refuse_factor(NAME)
    marker, settings = _MARKERS[str(file.config.get("peft_type"))], file.settings(Settings)
    update = _bat if settings.init_weights == "bat" else _repeated
    return [update(module, marker, settings) for module in complete(file, marker)]


def _bat(module: AdaptedModule, marker: str, settings: Settings) -> TargetUpdate:
    rank = settings.r
    count, *size = module.file.shape(module.keys[marker], 3)
    if size != [rank, rank]:
        raise module.disagree("(outputs/r, r, r), as bat has it", also=f"r is {rank}")

    def load(_: tuple[int, ...]) -> BlockAffineUpdate:
        return BlockAffineUpdate(module.read(marker))

    shapes = ((count * rank, None),)
    return SizedTarget(module.weight, "miss_bat", module.used, shapes, load, tiles=(rank, rank))


def _repeated(module: AdaptedModule, marker: str, settings: Settings) -> TargetUpdate:
    rank, mini = settings.r, settings.init_weights == "mini"
    height, width = module.file.shape(module.keys[marker], 2)
    if height != rank or (mini and settings.mini_r != width):
        raise module.disagree(
            "(r, outputs), or (r, mini_r) with init_weights=mini", also=f"r is {rank}, mini_r {settings.mini_r}"
        )

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        block = module.read(marker)
        left = block.T.repeat(shape[0] // width, 1)
        # The last repetition is cut off where r does not divide the inputs.
        right = torch.eye(rank, dtype=block.dtype).repeat(1, -(-shape[1] // rank))[:, : shape[1]]
        return LowRankUpdate.of(left, right)

    shapes: Shapes = ((None if mini else width, None),)  # mini repeats the block along the outputs, too
    return SizedTarget(
        module.weight, "miss", module.used, shapes, load, adds=True, low_rank=True, tiles=(width, 1),
        least_inputs=rank,
    )  # fmt: skip
