"""HiRA (Huang et al., ICLR 2025, eq. 4): W' = W + W ⊙ (B·A), on linear layers, embeddings and convolutions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import match_pattern, pattern, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.parts import Layered, Shapes, layered, linear_shapes
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "HiRA"
PEFT_TYPES = ("HIRA",)
FORMULA = "W + W ⊙ (B·A)"

_LINEAR = ("hira_A", "hira_B")
_EMBEDDING = ("hira_embedding_A", "hira_embedding_B")


@dataclass(frozen=True)
class ScaledUpdate:
    """weight ⊙ (1 + left·right), row by row; left: fp32 (rows, r), right: fp32 (r, columns)."""

    left: "torch.Tensor"
    right: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        factors = (self.left[rows] @ self.right).reshape(weight.shape)
        return weight.addcmul_(weight, factors)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. The rank is the file's, which rank_pattern and r have to describe."""
    found = layered(file, (*_LINEAR, *_EMBEDDING))
    if found:
        file.refuse_weight(NAME)
    return [_update(layer) for layer in found]


def _update(layer: Layered) -> TargetUpdate:
    file = layer.file
    embedding = any(m in layer.keys for m in _EMBEDDING)
    a_name, b_name = markers = _EMBEDDING if embedding else _LINEAR
    layer.need(*markers)
    a, b = layer.shape(a_name), layer.shape(b_name)
    ranks = pattern(file.config, "rank_pattern", file.where, int)
    r = whole(file.config, "r", file.where)
    # PEFT 0.21 follows rank_pattern for all but the first adapter of a model. The rank does not enter the formula.
    rank = r if a[0] == r else match_pattern(ranks, layer.name, r)
    matrices = len(a) == len(b) >= 2 and not (embedding and len(a) > 2)
    if not matrices or not a[0] == b[1] == rank or any(n != 1 for n in b[2:]) or len(layer.keys) > 2:
        raise layer.disagree(a_name, b_name, expected=f"A of shape ({rank}, in) and B of shape (out, {rank})")

    def load(shape: tuple[int, ...]) -> ScaledUpdate:
        down, up = layer.read(a_name).flatten(1), layer.read(b_name).flatten(1)
        if embedding:
            # PEFT adds what it looked up itself after the base layer's own factor, without that factor.
            found = layer.model_layer()
            return ScaledUpdate(down.T / (found.scale if found else 1.0), up.T)
        return ScaledUpdate(down.T, up.T) if flipped else ScaledUpdate(up, down)

    flipped = len(a) == 2 and file.is_conv1d(layer.name)
    shapes: Shapes = linear_shapes(file, layer.name, b[0], a[1])
    if embedding:
        shapes = ((a[1], b[0]),)
    elif len(a) > 2:
        shapes = ((b[0], *a[1:]),)
    kind = "hira_embedding" if embedding else "hira_convolution" if len(a) > 2 else "hira"
    return TargetUpdate(f"{layer.name}.weight", kind, (layer.keys[a_name], layer.keys[b_name]), shapes, load)
