"""BEFT (arXiv:2509.15974): b' = b + Δb, the bias of a layer alone."""

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.updates import BiasUpdate
from lora_export.contracts import TargetUpdate

NAME = "BEFT"
FORMULA = "b + Δb, biases alone"

_BIAS = "beft_bias"


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer's bias. AdapterError for a layer that has none: no weight equals an added bias."""
    return [_update(module) for module in complete(file, _BIAS)]


def _update(module: AdaptedModule) -> TargetUpdate:
    file, shape = module.file, module.shape(_BIAS)
    if len(shape) != 2 or shape[0] != 1:
        raise module.disagree("(1, out)")
    if file.base and file.base.has(module.weight) and not file.base.has(module.bias):
        raise file.refuse(
            "BEFT adds a bias to a layer that has none in this base, and nothing in a plain model can hold it",
            tensor=module.name,
            expected="a base whose layers have biases where the adapter changes them",
            next_step="serve it unmerged with PEFT",
        )

    def load(_: tuple[int, ...]) -> BiasUpdate:
        return BiasUpdate(module.read(_BIAS)[0], file.weight)

    return TargetUpdate(module.bias, "beft", module.used, ((shape[1],),), load, adds=True)
