"""What QLoRA training did to a 16-bit base on the fly: quantize, and compute with the dequantized weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import CheckpointError
from lora_export.quantization.bnb4 import Blocks4Bit
from lora_export.quantization.bnb8 import Rows8Bit

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainingQuantization:
    """method: nf4, fp4 or int8. double: the 4-bit block scales were quantized too (QLoRA's double quantization)."""

    method: str
    double: bool = False

    def round_trip(self, weight: "torch.Tensor") -> "torch.Tensor":
        """dequantize(quantize(weight)) in fp32, shape kept; the quantizing is bitsandbytes' own."""
        if self.method == "int8":
            return self._int8(weight)
        from bitsandbytes import functional as bnb

        packed, state = bnb.quantize_4bit(
            weight.contiguous(), quant_type=self.method, compress_statistics=self.double
        )
        scale = state.absmax
        if state.nested:
            scale = bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        shape = tuple(weight.shape)
        blocks = Blocks4Bit(packed.reshape(-1), state.code.float(), scale, state.blocksize, shape)
        return blocks.rows(0, shape[0])

    def _int8(self, weight: "torch.Tensor") -> "torch.Tensor":
        import torch
        from bitsandbytes import functional as bnb

        codes, scb, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return Rows8Bit(codes, scb.float()).rows(0, weight.shape[0])


def quantized_modules(folder: Path, config: Mapping[str, object]) -> frozenset[str]:
    """Names of the modules that transformers would have given to bitsandbytes, found on a model without weights.

    Linear layers, but not the output head, tied layers or whatever else transformers keeps in 16 bits.
    """
    import torch
    import transformers
    from accelerate import init_empty_weights
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = (settings.architectures or ["AutoModel"])[0]
    with init_empty_weights():
        model = getattr(transformers, architecture)(settings)
    model.tie_weights()
    kept = get_keys_to_not_convert(model)
    named = [(n, m) for n, m in model.named_modules() if should_convert_module(n, kept)]
    if any(isinstance(m, Conv1D) for _, m in named):
        raise CheckpointError(
            f"{architecture} has Conv1D layers, which bitsandbytes quantizes transposed",
            where=folder,
            expected="a model of plain linear layers with --training-quantization",
            next_step="merge into the unquantized base: leave --training-quantization away",
        )
    return frozenset(n for n, m in named if type(m) is torch.nn.Linear)
