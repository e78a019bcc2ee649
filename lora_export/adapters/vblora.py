"""VB-LoRA (arXiv:2405.15179, eq. 3-4): W' = W + B·A, put together of vectors of a bank that all layers share."""

from typing import TYPE_CHECKING

from lora_export.adapters.complete import integers, is_flipped, refuse_factor
from lora_export.adapters.config import whole
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import LowRank, LowRankUpdate
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "VB-LoRA"
PEFT_TYPES = ("VBLORA",)
FORMULA = "W + B·A, each piece of A and B the sum of k vectors of one bank, weighted by a softmax"

_BANK = "vblora_vector_bank"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims the bank."""
    short = bool(file.config.get("save_only_topk_weights"))
    markers, others = _markers(short), _markers(not short)
    modules, odd = group(file.tensors, markers), group(file.tensors, others)
    if odd:
        raise file.refuse(
            f"save_only_topk_weights is {str(short).lower()}, but the file holds {others[0]}",
            tensor=next(iter(next(iter(odd.values())).values())),
            expected=" and ".join(markers),
            next_step="set save_only_topk_weights in adapter_config.json to what the training had",
        )
    if not modules:
        return []
    refuse_factor(file, NAME)
    for name, keys in modules.items():
        if len(keys) != len(markers):
            raise file.refuse(
                f"this module has only {', '.join(sorted(keys))}",
                tensor=name,
                expected=" and ".join(markers),
                next_step="save the adapter again: model.save_pretrained(DIR)",
            )
    if _BANK not in file.tensors:
        raise file.refuse(f"{_BANK} cannot be found", expected="the bank of vectors that all layers share")
    first = next(iter(modules))
    return [_update(file, name, keys, short, (_BANK,) if name == first else ()) for name, keys in modules.items()]


def _markers(short: bool) -> tuple[str, ...]:
    endings = (_INDICES, _WEIGHTS) if short else ("",)
    return tuple(f"{side}{ending}" for side in _LOGITS for ending in endings)


def _update(
    file: AdapterFile, name: str, keys: dict[str, str], short: bool, claimed: tuple[str, ...]
) -> TargetUpdate:
    count, length = file.shape(_BANK, 2)
    rank, topk = whole(file.config, "r", file.where), whole(file.config, "topk", file.where)
    tiles = []
    for side, axis in zip(_LOGITS, (1, 0), strict=True):
        last = {"": count} if not short else {_INDICES: topk, _WEIGHTS: topk - 1}
        for ending, size in last.items():
            key = keys[side + ending]
            shape = file.shape(key, 3)
            if shape[1 - axis] != rank or shape[2] != size or topk > count:
                raise file.refuse(
                    f"the shape is {list(shape)}; r is {rank}, topk {topk}, the bank has {count} vectors",
                    tensor=key,
                    expected=f"({'r, inputs/length' if axis else 'outputs/length, r'}, {size})",
                )
            tiles.append(shape[axis])
    inputs, outputs = tiles[0] * length, tiles[-1] * length

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        bank = file.read(_BANK)
        pieces = (_pieces(file, keys, side, bank, topk, short) for side in _LOGITS)
        right, left = next(pieces).reshape(rank, inputs), next(pieces).transpose(1, 2).reshape(outputs, rank)
        if is_flipped(file, name, shape, outputs, inputs):
            left, right = right.T, left.T
        return LowRankUpdate(LowRank(left, right, 1.0))

    used = (*keys.values(), *claimed)
    shapes = ((outputs, inputs), (inputs, outputs))
    return TargetUpdate(f"{name}.weight", "vblora", used, shapes, load, adds=True, low_rank=True)


def _pieces(
    file: AdapterFile, keys: dict[str, str], side: str, bank: "torch.Tensor", topk: int, short: bool
) -> "torch.Tensor":
    """The vectors of all pieces (…, length). Short files hold the softmax, but for its last weight."""
    import torch

    if short:
        indices = integers(file, keys[side + _INDICES], len(bank))
        known = file.read(keys[side + _WEIGHTS])
        weights = torch.cat([known, (1 - known.sum(-1, keepdim=True)).clamp_min(0)], dim=-1)
    else:
        # Ties are broken by PEFT's own choice, which it makes on fp32.
        logits = file.read(keys[side])
        indices = logits.float().topk(topk, dim=-1).indices
        weights = logits.gather(-1, indices).double().softmax(-1).to(logits.dtype)
    found = torch.zeros(*indices.shape[:-1], bank.shape[1], dtype=bank.dtype)
    for k in range(topk):
        found += weights[..., k, None] * bank[indices[..., k]]
    return found
