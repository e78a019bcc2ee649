"""Show what an adapter changed: the same prompt, continued greedily by the base and by the merged model.

    python examples/generate.py BASE MERGED --prompt "It is with great satisfaction that I"

BASE and MERGED are Hugging Face model folders.
"""

import argparse
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "It is with great satisfaction that I"


def continuation(folder: Path, prompt: str, tokens: int) -> str:
    """The greedy continuation of `prompt` by the model in `folder`, computed in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("merged", type=Path, metavar="MERGED")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=40, help="new tokens to write")
    args = parser.parse_args()
    print(f"prompt: {args.prompt.strip()}")
    print(f"\nbase:   {continuation(args.base, args.prompt, args.tokens)}")
    print(f"\nmerged: {continuation(args.merged, args.prompt, args.tokens)}")


if __name__ == "__main__":
    main()
