"""fp8 weights as DeepSeek, transformers and FBGEMM save them: a tensor of fp8 numbers, and beside it its scales.

X.weight F8_E4M3 or F8_E5M2 (out, in) with X.weight_scale_inv, X.weight_scale, X.scale, X.qscale_weight, or with a
dot X.weight.scale; fp32, bf16 or E8M0; for the tensor, for each row (FBGEMM), or for each block of
weight_block_size (short blocks at the ends are legal). Fused experts have three dimensions: X.experts.gate_up_proj
with …gate_up_proj_scale_inv, (experts, blocks, blocks). DeepSeek V4's experts are E2M1 numbers, two in a byte of an
int8 tensor, with an E8M0 scale for each 32 of a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_export.contracts import TensorSource
from lora_export.quantization.fp4 import BYTES, fp4_weight
from lora_export.quantization.scaled import POWERS, block_of, scaled_weight
from lora_export.quantization.settings import decoded_settings
from lora_export.quantization.stored import QuantizedWeight, unread

TENSORS = "fp8 tensors, and scales such as …q_proj.weight_scale_inv or …q_proj.weight_scale"
NUMBERS = ("F8_E4M3", "F8_E5M2")
_BESIDE = ("_scale_inv", "_scale", ".scale_inv", ".scale")
_OF_A_LAYER = ("scale_inv", "scale", "qscale_weight")


@dataclass(frozen=True)
class Fp8Settings:
    weight_block_size: tuple[int, ...] | None = None


def describe(settings: Mapping[str, Any]) -> str:
    if settings.get("quant_method") != "fp8":
        return str(settings.get("quant_method"))
    return f"fp8 in blocks of {settings.get('weight_block_size') or 'whole tensors'}"


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[QuantizedWeight]:
    size = decoded_settings(config, Fp8Settings).weight_block_size
    block = block_of(size)
    if size and block is None:
        raise unread(f"weight_block_size is {list(size)}", "the height and width of a block")
    weights: list[QuantizedWeight] = []
    for name, info in source.tensors.items():
        scale = scale_of(source, name)
        if scale is None:
            continue
        if info.dtype in NUMBERS:
            weights.append(scaled_weight(source, name, scale, None, dtype, NUMBERS, block))
        elif info.dtype in BYTES and source.tensors[scale].dtype in POWERS:
            weights.append(fp4_weight(source, name, (name, scale), dtype))
    return weights


def scale_of(source: TensorSource, name: str) -> str | None:
    """The name of the scales beside a tensor of this name, if they are there."""
    return next((n for n in _candidates(name) if n in source.tensors), None)


def _candidates(name: str) -> Iterator[str]:
    yield from (f"{name}{end}" for end in _BESIDE)
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        yield from (f"{module}.{other}" for other in _OF_A_LAYER)
