"""A decoder on prompts: logits of every position, and greedy continuations."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_export.validation.prompts import MAX_TOKENS

GREEDY_TOKENS = 64


def tokenize(tokenizer: Any, prompts: Sequence[str], vocabulary: int) -> list[torch.Tensor]:
    """Ids of each prompt, shape (length,), at least two and at most MAX_TOKENS of them."""
    tokens = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"][0]
        ids = ids[ids < vocabulary]
        if len(ids) >= 2:
            tokens.append(ids)
    return tokens


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """fp32 logits (length, vocabulary) of each prompt, one prompt at a time so that no padding enters."""
    return [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in tokens]


@torch.inference_mode()
def greedy(model: Any, ids: torch.Tensor, count: int = GREEDY_TOKENS) -> torch.Tensor:
    """`count` greedy tokens after the prompt, shape (count,), with a KV cache; end-of-text does not stop it."""
    out, past, step = [], None, ids[None]
    for _ in range(count):
        result = model(input_ids=step, past_key_values=past, use_cache=True)
        past = result.past_key_values
        step = result.logits[:, -1].argmax(-1, keepdim=True)
        out.append(step[0, 0])
    return torch.stack(out)


@torch.inference_mode()
def greedy_steps(model: Any, ids: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
    """Logits (count, vocabulary) at each step of a given continuation, in one forward."""
    full = torch.cat([ids, continuation[:-1]])
    steps: torch.Tensor = model(input_ids=full[None], use_cache=False).logits[0, len(ids) - 1 :].float()
    return steps
