"""Which quantized weights a checkpoint holds. One file a format; what is not known is refused by name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization import bnb4, bnb8

if TYPE_CHECKING:
    import torch

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Rows(Protocol):
    def rows(self, start: int, stop: int) -> "torch.Tensor": ...


class QuantizedWeight(Protocol):
    """A weight of logical `shape` stored in `parts`; dtype is what it was before it was quantized."""

    @property
    def weight(self) -> str: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

    def load(self, source: TensorSource) -> Rows: ...


def find_quantized(source: TensorSource, config: Mapping[str, Any]) -> dict[str, QuantizedWeight]:
    """Weight name → how to read it. Empty for a checkpoint that is not quantized."""
    settings = config.get("quantization_config")
    if not settings:
        return {}
    method = settings.get("quant_method", "bitsandbytes" if _is_bnb(settings) else None)
    if method != "bitsandbytes":
        raise CheckpointError(
            f"the base is quantized with {method!r}, which this tool does not read",
            where="config.json",
            expected="an unquantized base, or one that bitsandbytes saved in 4 or 8 bits",
            next_step="give the unquantized base model that this one was made from as -b",
        )
    if config.get("model_type") in ("gpt2", "openai-gpt", "imagegpt"):
        raise CheckpointError(
            "a quantized model with Conv1D layers, whose weights bitsandbytes stores transposed",
            where="config.json",
            expected="an unquantized base of this architecture",
            next_step="give the unquantized base as -b with --training-quantization",
        )
    dtype = _TYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "float16"), "F16")
    found: list[QuantizedWeight] = [*bnb4.find(source), *bnb8.find(source, dtype)]
    if not found:
        raise CheckpointError(
            "config.json says that bitsandbytes quantized this model, but no quantized weight is here",
            where="config.json",
            expected="weights with a quant_state (4 bits) or SCB (8 bits)",
            next_step="if the weights are not quantized, remove quantization_config from config.json",
        )
    return {w.weight: w for w in found}


def _is_bnb(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("load_in_4bit") or settings.get("load_in_8bit"))
