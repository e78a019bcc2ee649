"""AutoRound (arXiv:2309.05516): its codes lie as GPTQ's or AWQ's do; `packing_format` says which.

"auto_round:auto_gptq" is GPTQ with zeros less one, "auto_round:gptqmodel" and "auto_round" with zeros as they are,
"auto_round:auto_awq" AWQ. Layers with settings of their own stand in `extra_config`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization import awq, gptq

LESS_ONE = ("auto", "auto_round:gptq", "auto_round:auto_gptq")
AS_THEY_ARE = ("auto_round", "auto_round:gptqmodel")
AWQ = ("auto_round:awq", "auto_round:auto_awq")


def find(
    source: TensorSource, settings: Mapping[str, Any], dtype: str
) -> Sequence[gptq.GptqWeight | awq.AwqWeight]:
    """Every AutoRound weight of a checkpoint, checked by headers; dtype: what the model computes in."""
    packing = settings.get("packing_format", "auto_round:auto_gptq")
    rotated = next((n for n in ("rotation_config", "hadamard_config") if settings.get(n)), None)
    if packing not in (*LESS_ONE, *AS_THEY_ARE, *AWQ) or rotated:
        raise CheckpointError(
            f"AutoRound with {rotated}, rotated weights" if rotated else f"AutoRound packed as {packing!r}",
            where="config.json",
            expected=", ".join((*LESS_ONE[1:], *AS_THEY_ARE, *AWQ[1:])),
            next_step="give the unquantized base model that this one was made from as -b",
        )
    if packing in AWQ:
        return awq.find(source, {**settings, "version": "gemm"}, dtype)
    layout = "gptq" if packing in LESS_ONE else "gptq_v2"
    return gptq.find(source, {**settings, "checkpoint_format": layout}, dtype)
