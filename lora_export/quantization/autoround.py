"""AutoRound (arXiv:2309.05516): its codes lie as GPTQ's or AWQ's do; `packing_format` says which.

"auto_round:auto_gptq" is GPTQ with zeros less one, "auto_round:gptqmodel" and "auto_round" with zeros as they are,
"auto_round:auto_awq" AWQ. Layers with settings of their own stand in `extra_config`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_export.contracts import TensorSource
from lora_export.quantization.awq import AwqSettings, awq_weights
from lora_export.quantization.gptq import GptqSettings, gptq_weights, in_groups
from lora_export.quantization.settings import decoded_settings
from lora_export.quantization.stored import ORIGINAL, QuantizedWeight, unread

TENSORS = "tensors such as …q_proj.qweight"
LESS_ONE = ("auto", "auto_round:gptq", "auto_round:auto_gptq")
AS_THEY_ARE = ("auto_round", "auto_round:gptqmodel")
AWQ = ("auto_round:awq", "auto_round:auto_awq")


@dataclass(frozen=True)
class AutoRoundSettings:
    packing_format: str = "auto_round:auto_gptq"
    rotation_config: Any = None
    hadamard_config: Any = None


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> Sequence[QuantizedWeight]:
    settings = decoded_settings(config, AutoRoundSettings)
    packing = settings.packing_format
    rotations = {"rotation_config": settings.rotation_config, "hadamard_config": settings.hadamard_config}
    rotated = next((name for name, value in rotations.items() if value), None)
    if packing not in (*LESS_ONE, *AS_THEY_ARE, *AWQ) or rotated:
        text = f"AutoRound with {rotated}, rotated weights" if rotated else f"AutoRound packed as {packing!r}"
        raise unread(text, ", ".join((*LESS_ONE[1:], *AS_THEY_ARE, *AWQ[1:])), ORIGINAL)
    if packing in AWQ:
        return awq_weights(source, replace(decoded_settings(config, AwqSettings), version="gemm"), dtype)
    layout = "gptq" if packing in LESS_ONE else "gptq_v2"
    return gptq_weights(source, replace(decoded_settings(config, GptqSettings), checkpoint_format=layout), dtype)


def describe(settings: Mapping[str, Any]) -> str:
    return in_groups("AutoRound", settings)
