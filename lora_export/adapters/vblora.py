"""VB-LoRA (arXiv:2405.15179, eq. 3-4): W' = W + B·A, put together of vectors of a bank that all layers share."""

from dataclasses import dataclass

import torch

from lora_export.adapters.config import Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete, modules
from lora_export.adapters.updates import LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "VB-LoRA"
FORMULA = "W + B·A, each piece of A and B the sum of k vectors of one bank, weighted by a softmax"

_BANK = "vblora_vector_bank"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


@dataclass(frozen=True)
class Settings:
    """save_only_topk_weights: the file holds the softmax of the k largest logits, but for its last weight."""

    r: Positive
    topk: Positive
    save_only_topk_weights: bool | None = None


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims the bank."""
    settings = file.settings(Settings)
    short = bool(settings.save_only_topk_weights)
    markers, others = _markers(short), _markers(not short)
    for module in modules(file, *others):
        raise file.refuse(
            f"save_only_topk_weights is {str(short).lower()}, but the file holds {others[0]}",
            tensor=module.used[0],
            expected=" and ".join(markers),
            next_step="set save_only_topk_weights in adapter_config.json to what the training had",
        )
    file.refuse_factor(NAME)
    adapted = complete(file, *markers)
    if adapted and _BANK not in file.tensors:
        raise file.refuse(f"{_BANK} is missing", expected="the bank of vectors that all layers share")
    return [_update(module, settings, (_BANK,) if module is adapted[0] else ()) for module in adapted]


def _markers(short: bool) -> tuple[str, ...]:
    endings = (_INDICES, _WEIGHTS) if short else ("",)
    return tuple(f"{side}{ending}" for side in _LOGITS for ending in endings)


def _update(module: AdaptedModule, settings: Settings, claimed: tuple[str, ...]) -> TargetUpdate:
    file, rank, topk = module.file, settings.r, settings.topk
    count, length = file.shape(_BANK, 2)
    tiles = []
    for side, axis in zip(_LOGITS, (1, 0), strict=True):
        last = {"": count, _INDICES: topk, _WEIGHTS: topk - 1}
        for marker in (m for m in module.keys if m.startswith(side)):
            shape, size = file.shape(module.keys[marker], 3), last[marker.removeprefix(side)]
            if shape[1 - axis] != rank or shape[2] != size or topk > count:
                raise module.disagree(
                    f"({'r, inputs/length' if axis else 'outputs/length, r'}, {size})",
                    marker,
                    also=f"r is {rank}, topk {topk}, the bank has {count} vectors",
                )
            tiles.append(shape[axis])
    inputs, outputs = tiles[0] * length, tiles[-1] * length

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        bank = file.read(_BANK)
        a, b = (_pieces(module, side, bank, settings) for side in _LOGITS)
        right, left = a.reshape(rank, inputs), b.transpose(1, 2).reshape(outputs, rank)
        return LowRankUpdate.of(left, right, flipped=module.is_flipped(shape, outputs, inputs))

    used, shapes = (*module.used, *claimed), ((outputs, inputs), (inputs, outputs))
    return TargetUpdate(module.weight, "vblora", used, shapes, load, adds=True, low_rank=True)


def _pieces(module: AdaptedModule, side: str, bank: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The vectors of all pieces (…, length)."""
    if settings.save_only_topk_weights:
        indices = module.indices(side + _INDICES, len(bank))
        known = module.read(side + _WEIGHTS)
        weights = torch.cat([known, (1 - known.sum(-1, keepdim=True)).clamp_min(0)], dim=-1)
    else:
        # Ties are broken by PEFT's own choice, which it makes on fp32.
        logits = module.read(side)
        indices = logits.float().topk(settings.topk, dim=-1).indices
        weights = logits.gather(-1, indices).double().softmax(-1).to(logits.dtype)
    pieces = torch.zeros(*indices.shape[:-1], bank.shape[1], dtype=bank.dtype)
    for k in range(settings.topk):
        pieces += weights[..., k, None] * bank[indices[..., k]]
    return pieces
