"""Modules that change nothing, which only their numbers tell: trainers write what they never touched as zeros."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_export.adapters.diffusion.kinds.module import Trained
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts.pipelines import TrainedModule

if TYPE_CHECKING:
    pass

# Products of which all are added: one that has a factor of zeros adds nothing.
_PRODUCTS: Sequence[Sequence[str]] = (
    ("lora_down", "lora_up", "lora_mid", "scalar"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "scalar"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "scalar"),
    ("a1", "a2", "scalar"),
    ("b1", "b2", "scalar"),
    ("lora_up_bias",), ("weight",), ("diff",), ("diff_b",), ("diff_m",), ("w_norm",), ("b_norm",), ("oft_blocks",),
)  # fmt: skip
# What changes a weight even where everything else is zero.
_ALWAYS = ("dora_scale", "magnitude", "set_weight")


def is_unchanged(file: AdapterFile, module: TrainedModule) -> bool:
    """Whether the module leaves every weight as it is. Smaller tensors are read first, and no more than needed."""
    trained = Trained(file, module, {})
    if any(trained.has(part) for part in _ALWAYS):
        return False
    if trained.has("rescale") and not bool((trained.read("rescale") == 1).all()):
        return False
    present = [[part for part in product if trained.has(part)] for product in _PRODUCTS]
    return all(_has_zeros(trained, product) for product in present if set(product) - {"scalar"})


def _has_zeros(trained: Trained, parts: Sequence[str]) -> bool:
    """Whether one of them is all zeros."""
    import torch

    by_size = sorted(parts, key=lambda part: trained.file.tensors[trained.module.keys[part]].nbytes)
    return any(not bool(torch.any(trained.read(part))) for part in by_size)
