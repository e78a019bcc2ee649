"""BEFT (arXiv:2509.15974): b' = b + Δb, the bias of a layer alone."""

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import BiasUpdate
from lora_export.adapters.parts import Layered, layered
from lora_export.contracts import TargetUpdate

NAME = "BEFT"
PEFT_TYPES = ("BEFT",)
FORMULA = "b + Δb, biases alone"

_BIAS = "beft_bias"


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer's bias. AdapterError for a layer that has none: no weight equals an added bias."""
    return [_update(layer) for layer in layered(file, (_BIAS,))]


def _update(layer: Layered) -> TargetUpdate:
    file, shape = layer.file, layer.shape(_BIAS)
    if len(shape) != 2 or shape[0] != 1:
        raise layer.disagree(_BIAS, expected="(1, out)")
    if file.base and file.base.has(f"{layer.name}.weight") and not file.base.has(f"{layer.name}.bias"):
        raise file.refuse(
            "BEFT adds a bias to a layer that has none in this base, and nothing in a plain model can hold it",
            tensor=layer.name,
            expected="a base whose layers have biases where the adapter changes them",
            next_step="serve it unmerged with PEFT",
        )

    def load(_: tuple[int, ...]) -> BiasUpdate:
        return BiasUpdate(layer.read(_BIAS)[0], file.weight)

    return TargetUpdate(f"{layer.name}.bias", "beft", layer.used, ((shape[1],),), load, adds=True)
