"""HiRA (Huang et al., ICLR 2025, eq. 4): W' = W + W ⊙ (B·A), on linear layers, embeddings and convolutions."""

from dataclasses import dataclass

import torch

from lora_export.adapters.config import PatternedRank
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.contracts import TargetUpdate

NAME = "HiRA"
FORMULA = "W + W ⊙ (B·A)"

_LINEAR = ("hira_A", "hira_B")
_EMBEDDING = ("hira_embedding_A", "hira_embedding_B")


@dataclass(frozen=True)
class ScaledUpdate:
    """weight ⊙ (1 + left·right), row by row; left: fp32 (rows, r), right: fp32 (r, columns)."""

    left: torch.Tensor
    right: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        factors = (self.left[rows] @ self.right).reshape(weight.shape)
        return weight.addcmul_(weight, factors)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. The rank is the file's, which rank_pattern and r have to describe."""
    file.refuse_weight(NAME)
    ranks = file.settings(PatternedRank)
    return [_update(module, ranks) for module in modules(file, *_LINEAR, *_EMBEDDING)]


def _update(module: AdaptedModule, ranks: PatternedRank) -> TargetUpdate:
    embedding = any(m in module.keys for m in _EMBEDDING)
    a_name, b_name = markers = _EMBEDDING if embedding else _LINEAR
    module.need(*markers)
    a, b = module.shape(a_name), module.shape(b_name)
    # PEFT 0.21 follows rank_pattern for all but the first adapter of a model. The rank does not enter the formula.
    rank = ranks.r if a[0] == ranks.r else ranks.rank(module.name)
    matrices = len(a) == len(b) >= 2 and not (embedding and len(a) > 2)
    if not matrices or not a[0] == b[1] == rank or any(n != 1 for n in b[2:]) or len(module.keys) > 2:
        raise module.disagree(f"A of shape ({rank}, in) and B of shape (out, {rank})")

    def load(shape: tuple[int, ...]) -> ScaledUpdate:
        down, up = module.read(a_name).flatten(1), module.read(b_name).flatten(1)
        if embedding:
            # PEFT adds what it looked up itself after the base layer's own factor, without that factor.
            layer = module.layer()
            return ScaledUpdate(down.T / (layer.scale if layer else 1.0), up.T)
        return ScaledUpdate(down.T, up.T) if flipped else ScaledUpdate(up, down)

    flipped = len(a) == 2 and module.is_conv1d
    kind, shapes = "hira", module.stored(b[0], a[1])
    if embedding:
        kind, shapes = "hira_embedding", ((a[1], b[0]),)
    elif len(a) > 2:
        kind, shapes = "hira_convolution", ((b[0], *a[1:]),)
    return TargetUpdate(module.weight, kind, module.used, shapes, load)
