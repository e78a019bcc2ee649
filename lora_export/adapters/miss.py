"""MiSS (arXiv:2409.15371), and Bone, its name in PEFT before 0.17: one block D, repeated along the inputs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.complete import SizedTarget, refuse_factor
from lora_export.adapters.config import whole
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import LowRank, LowRankUpdate
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "MiSS"
PEFT_TYPES = ("MISS", "BONE")
FORMULA = "W + Dᵀ·(I I … I), one block of r inputs repeated; bat: W + (W + I)·D in blocks of r×r"

_MARKERS = {"MISS": "miss_block", "BONE": "bone_block"}


@dataclass(frozen=True)
class BlockAffineUpdate:
    """Each r×r block of a row of blocks becomes block + block·D + D. blocks: fp32 (outputs/r, r, r)."""

    blocks: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        size = self.blocks.shape[-1]
        row = torch.arange(rows.start, rows.start + len(weight), device=weight.device)
        parts = weight.reshape(len(weight), -1, size)
        for owner in torch.unique(row // size).tolist():
            mine = row // size == owner
            block = self.blocks[owner]
            parts[mine] += parts[mine] @ block + block[row[mine] % size, None]
        return parts.reshape(weight.shape)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each linear layer."""
    marker = _MARKERS[str(file.config.get("peft_type"))]
    modules = group(file.tensors, (marker,))
    if not modules:
        return []
    refuse_factor(file, NAME)
    form, rank = file.config.get("init_weights", True), whole(file.config, "r", file.where)
    if not isinstance(form, bool) and form not in ("bat", "mini"):
        raise file.refuse(
            f"init_weights is {form!r}, which decides how the block is used", expected="true, false, bat or mini"
        )
    if form == "bat":
        return [_bat(file, name, keys[marker], rank) for name, keys in modules.items()]
    repeats = whole(file.config, "mini_r", file.where) if form == "mini" else None
    return [_repeated(file, name, keys[marker], rank, repeats) for name, keys in modules.items()]


def _bat(file: AdapterFile, name: str, key: str, rank: int) -> TargetUpdate:
    count, *size = file.shape(key, 3)
    if size != [rank, rank]:
        raise file.refuse(
            f"the shape is {[count, *size]}, r is {rank}", tensor=key, expected="(outputs/r, r, r), as bat has it"
        )

    def load(_: tuple[int, ...]) -> BlockAffineUpdate:
        return BlockAffineUpdate(file.read(key))

    return SizedTarget(f"{name}.weight", "miss_bat", (key,), ((count * rank, None),), load, tiles=(rank, rank))


def _repeated(file: AdapterFile, name: str, key: str, rank: int, outputs: int | None) -> TargetUpdate:
    """outputs: of `mini`, whose block is repeated along the outputs, too."""
    height, width = file.shape(key, 2)
    if height != rank or outputs not in (None, width):
        raise file.refuse(
            f"the shape is {[height, width]}, r is {rank}, mini_r is {outputs}",
            tensor=key,
            expected="(r, outputs), or (r, mini_r) with init_weights=mini",
        )

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        import torch

        block = file.read(key)
        left = block.T.repeat(shape[0] // width, 1)
        # The last repetition is cut off where r does not divide the inputs.
        right = torch.eye(rank, dtype=block.dtype).repeat(1, -(-shape[1] // rank))[:, : shape[1]]
        return LowRankUpdate(LowRank(left, right, 1.0))

    shapes: tuple[tuple[int | None, ...], ...] = ((width if outputs is None else None, None),)
    return SizedTarget(
        f"{name}.weight",
        "miss",
        (key,),
        shapes,
        load,
        adds=True,
        low_rank=True,
        tiles=(width, 1),
        least_inputs=rank,
    )
