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
    for target, keys in _by_target(source, claimed).items():
        kind = _kind(target, config)
        if weight != 1.0:
            raise AdapterError(
                f"this tensor replaces the base's, so it cannot be weighted with {weight}",
                where=source.tensors[keys[0]].file,
                tensor=keys[0],
                expected="weight 1, or an adapter without modules_to_save and trained biases",
            )
        updates.append(_replace(source, keys, target, kind))
    return updates


def _by_target(source: TensorSource, claimed: Set[str]) -> dict[str, list[str]]:
    """Base name → its keys, the trained one first.

    With bias="all", PEFT saves the bias of a saved module up to three times: under its own name, inside
    .modules_to_save (the same values), and as .original_module (the old ones, which its forward ignores).
    """
    targets: dict[str, list[str]] = {}
    for key in source.tensors:
        if key not in claimed:
            targets.setdefault(base_name(key), []).append(key)
    for keys in targets.values():
        keys.sort(key=lambda k: (".original_module" in k, ".modules_to_save" in k))
    return targets


def _replace(source: TensorSource, keys: list[str], target: str, kind: str) -> TargetUpdate:
    def load(shape: tuple[int, ...]) -> Replacement:
        return Replacement(read_finite(source, keys[0]))

    shape = source.tensors[keys[0]].shape
    return TargetUpdate(target, kind, tuple(keys), (shape,), load, replaces=True)


def _kind(target: str, config: LoraConfig) -> str:
    module, _, leaf = target.rpartition(".")
    parts = module.split(".")
    # PEFT's rule is a plain endswith: "norm" saves input_layernorm too. What lies inside a saved module counts.
    if any(".".join(parts[: i + 1]).endswith(config.modules_to_save) for i in range(len(parts))):
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
