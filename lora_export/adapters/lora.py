"""LoRA (arXiv:2106.09685, eq. 3): W' = W + s·B·A, on linear layers, GPT-2's Conv1D and embeddings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import LoraConfig
from lora_export.adapters.keys import group, read_finite
from lora_export.contracts import TargetUpdate, TensorInfo, TensorSource
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

LINEAR = ("lora_A", "lora_B")
LORA_BIAS = "lora_B.bias"
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class LowRankUpdate:
    """weight + scaling · left · right; left is fp32 (rows, r), right is fp32 (r, columns)."""

    left: "torch.Tensor"
    right: "torch.Tensor"
    scaling: float
    row_wise: bool = True

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        return torch.addmm(weight, self.left[rows], self.right, alpha=self.scaling)


@dataclass(frozen=True)
class BiasUpdate:
    """bias + scaling · addend, for lora_bias; both of shape (out,)."""

    addend: "torch.Tensor"
    scaling: float
    row_wise: bool = True

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return weight + self.scaling * self.addend[rows]


def read_updates(source: TensorSource, config: LoraConfig, weight: float) -> list[TargetUpdate]:
    """One update for each LoRA module in the file; `weight` multiplies the whole delta."""
    updates = []
    for module, keys in group(source.tensors, (*LINEAR, LORA_BIAS)).items():
        _require(module, keys, LINEAR, config)
        updates.append(_linear(source, config, weight, module, keys))
        if LORA_BIAS in keys:
            updates.append(_bias(source, config, weight, module, keys))
    for module, keys in group(source.tensors, EMBEDDING).items():
        _require(module, keys, EMBEDDING, config)
        updates.append(_embedding(source, config, weight, module, keys))
    return updates


def _require(module: str, keys: dict[str, str], markers: tuple[str, str], config: LoraConfig) -> None:
    missing = [m for m in markers if m not in keys]
    if missing:
        raise AdapterError(
            f"{missing[0]} of this module is missing, {', '.join(keys)} is there",
            where=config.where.parent,
            tensor=module,
            expected="both " + " and ".join(markers),
            next_step="save the adapter again: model.save_pretrained(DIR)",
        )


def _matrices(
    source: TensorSource, config: LoraConfig, module: str, a_key: str, b_key: str
) -> tuple[TensorInfo, TensorInfo, int]:
    a, b = source.tensors[a_key], source.tensors[b_key]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(
            f"A and B have shapes {list(a.shape)} and {list(b.shape)}: a convolution, or not LoRA",
            where=config.where.parent,
            tensor=module,
            expected="two matrices (LoRA on linear layers and embeddings)",
        )
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"A {list(a.shape)} and B {list(b.shape)} disagree about the rank",
            where=a.file,
            tensor=module,
            expected="A of shape (r, in) and B of shape (out, r)",
        )
    return a, b, a.shape[0]


def _linear(
    source: TensorSource, config: LoraConfig, weight: float, module: str, keys: dict[str, str]
) -> TargetUpdate:
    a_key, b_key = keys["lora_A"], keys["lora_B"]
    a, b, rank = _matrices(source, config, module, a_key, b_key)
    scaling = weight * config.scaling(module, rank)
    plain, transposed = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        # A square weight has both shapes; then only the configuration knows (GPT-2's attention projection).
        flip = config.fan_in_fan_out if plain == transposed else shape == transposed
        down, up = read_finite(source, a_key), read_finite(source, b_key)
        return LowRankUpdate(down.T, up.T, scaling) if flip else LowRankUpdate(up, down, scaling)

    return TargetUpdate(f"{module}.weight", "lora", (a_key, b_key), (plain, transposed), load)


def _bias(
    source: TensorSource, config: LoraConfig, weight: float, module: str, keys: dict[str, str]
) -> TargetUpdate:
    key = keys[LORA_BIAS]
    scaling = weight * config.scaling(module, source.tensors[keys["lora_B"]].shape[1])

    def load(shape: tuple[int, ...]) -> BiasUpdate:
        return BiasUpdate(read_finite(source, key), scaling)

    return TargetUpdate(f"{module}.bias", "lora_bias", (key,), (source.tensors[key].shape,), load)


def _embedding(
    source: TensorSource, config: LoraConfig, weight: float, module: str, keys: dict[str, str]
) -> TargetUpdate:
    a_key, b_key = keys["lora_embedding_A"], keys["lora_embedding_B"]
    a, b, rank = _matrices(source, config, module, a_key, b_key)  # A (r, vocabulary), B (width, r)
    scaling = weight * config.scaling(module, rank)

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        return LowRankUpdate(read_finite(source, a_key).T, read_finite(source, b_key).T, scaling)

    shapes = ((a.shape[1], b.shape[0]),)
    return TargetUpdate(f"{module}.weight", "lora_embedding", (a_key, b_key), shapes, load)
