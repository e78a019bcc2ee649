"""Whole tensors in an adapter file: modules_to_save, trained biases, resized embeddings. They replace."""

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import LoraConfig
from lora_export.adapters.keys import base_name, read_finite
from lora_export.contracts import TargetUpdate, TensorSource
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

# PEFT saves these beside the adapter when the vocabulary was resized, or when they are targets themselves.
EMBEDDING_NAMES = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "lm_head", "embed_out"}
)


@dataclass(frozen=True)
class Replacement:
    """The trained tensor itself, fp32; the old weight does not enter."""

    value: "torch.Tensor"
    row_wise: bool = True

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.value[rows]


def read_updates(source: TensorSource, config: LoraConfig, weight: float, claimed: Set[str]) -> list[TargetUpdate]:
    """A replacement for each whole tensor that the configuration explains; any other key is refused."""
    updates = []
    for key in source.tensors:
        if key in claimed:
            continue
        target = base_name(key)
        kind = _kind(target, config)
        if weight != 1.0:
            raise AdapterError(
                f"this tensor replaces the base's, so it cannot be weighted with {weight}",
                where=source.tensors[key].file,
                tensor=key,
                expected="weight 1, or an adapter without modules_to_save and trained biases",
            )
        updates.append(_replace(source, key, target, kind))
    return updates


def _replace(source: TensorSource, key: str, target: str, kind: str) -> TargetUpdate:
    def load(shape: tuple[int, ...]) -> Replacement:
        return Replacement(read_finite(source, key))

    shape = source.tensors[key].shape
    return TargetUpdate(target, kind, (key,), (shape,), load, replaces=True)


def _kind(target: str, config: LoraConfig) -> str:
    module, _, leaf = target.rpartition(".")
    if any(f".{module}.".endswith(f".{name}.") or f".{name}." in f".{module}." for name in config.modules_to_save):
        return "modules_to_save"
    if leaf == "bias" and config.bias != "none":
        return "bias"
    if leaf == "weight" and module.rpartition(".")[2] in EMBEDDING_NAMES:
        return "embedding"
    raise AdapterError(
        "no adapter kind explains this tensor",
        where=config.where.parent,
        tensor=target,
        expected="LoRA matrices, or modules and biases that adapter_config.json names",
        next_step="lora-export inspect ADAPTER shows how the adapter was understood",
    )
