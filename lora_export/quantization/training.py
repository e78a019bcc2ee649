"""What QLoRA training does to a 16-bit base: it quantizes the weights and computes with them dequantized."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import meta_model
from lora_export.quantization.bitsandbytes import Blocks4Bit, Rows8Bit

if TYPE_CHECKING:
    import torch

BLOCKSIZE = 64  # elements; bitsandbytes' own for its 4-bit layers


@dataclass(frozen=True)
class TrainingQuantization:
    """method: nf4, fp4 or int8. double: the 4-bit block scales were quantized too (QLoRA's double quantization).
    transposed: the weight is a Conv1D's, which transformers transposes to (out, in) before it quantizes it.
    """

    method: str
    double: bool = False
    transposed: bool = False

    def row_wise(self, shape: tuple[int, ...]) -> bool:
        """Whether blocks of rows may be given: block scales that are quantized share one offset."""
        if self.transposed:
            return False
        return self.method == "int8" or (not self.double and math.prod(shape[1:]) % BLOCKSIZE == 0)

    def round_trip(self, weight: "torch.Tensor") -> "torch.Tensor":
        """dequantize(quantize(weight)) in fp32, shape kept; the quantizing is bitsandbytes' own."""
        if self.transposed:
            return replace(self, transposed=False).round_trip(weight.T.contiguous()).T.contiguous()
        if self.method == "int8":
            return self._int8(weight)
        from bitsandbytes import functional as bnb

        packed, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=BLOCKSIZE, quant_type=self.method, compress_statistics=self.double
        )
        scale = state.absmax
        if state.nested:
            scale = bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        shape = tuple(weight.shape)
        codes = packed.reshape(-1)
        blocks = Blocks4Bit(lambda a, b: codes[a:b], state.code.float(), scale, state.blocksize, shape)
        return blocks.rows(0, shape[0])

    def _int8(self, weight: "torch.Tensor") -> "torch.Tensor":
        import torch
        from bitsandbytes import functional as bnb

        codes, scb, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return Rows8Bit(codes, scb.float()).rows(0, weight.shape[0])


def quantized_modules(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """Name of each module that transformers quantizes with bitsandbytes → whether it is a Conv1D.

    config: used instead of the contents of config.json, where another class was trained.
    These are linear layers, but not the output head, tied layers or whatever else transformers keeps in 16 bits.
    """
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = meta_model.build(folder, config)
    kept = get_keys_to_not_convert(model)
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if should_convert_module(name, kept) and (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
    }
