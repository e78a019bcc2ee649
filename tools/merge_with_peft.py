"""What a script without this project does: load the base in bf16, attach the adapter, merge, save.

    python tools/merge_with_peft.py BASE ADAPTER OUT

A 4-bit base is dequantized first: PEFT would round the merged weights to 4 bits again.
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, output: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    quantized = model.config.to_dict().get("quantization_config") is not None
    if quantized:
        model = model.dequantize()
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    # transformers 5.23 would undo on saving what it did on loading, and knows no way back to 4 bits.
    merged.save_pretrained(output, save_original_format=not quantized)


if __name__ == "__main__":
    main(*sys.argv[1:])
