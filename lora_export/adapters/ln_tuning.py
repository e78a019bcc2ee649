"""LN tuning (arXiv:2312.11420): whole layers are trained, normalizations as a rule, and replace the base's."""

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.saved import Replacement
from lora_export.contracts import TargetUpdate

NAME = "LN tuning"
FORMULA = "the trained layer in place of the base's"

_MARKER = ".ln_tuning_layers."


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One replacement for each tensor of each trained layer."""
    file.refuse_weight("a replaced layer")
    return [_replace(file, key) for key in file.tensors if _MARKER in key]


def _replace(file: AdapterFile, key: str) -> TargetUpdate:
    module, _, leaf = key.partition(_MARKER)
    # PEFT takes the adapter's name out of the last two parts alone, so not where a layer has layers inside.
    leaf = leaf.removeprefix("default.")

    def load(_: tuple[int, ...]) -> Replacement:
        return Replacement(file, key)

    return TargetUpdate(f"{module}.{leaf}", "ln_tuning", (key,), (file.tensors[key].shape,), load, replaces=True)
