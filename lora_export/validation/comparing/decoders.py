"""A decoder on prompts: logits of every position, and greedy continuations."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_export.validation.comparing.prompts import MAX_TOKENS
from lora_export.validation.comparing.subject import plain, takes

GREEDY_TOKENS = 64
TOKENS_WITHOUT_CACHE = 16  # each of which reads the whole text again
# What transformers' caches raise that a model's layers cannot use: hybrids of attention and recurrence have some.
_UNUSABLE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


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
    return [_forward(model, ids).logits[0].float() for ids in tokens]


def _forward(model: Any, ids: torch.Tensor) -> Any:
    """One forward on a whole text (length,), without a cache where the model can have one."""
    body = plain(model)
    switch = {"use_cache": False} if "use_cache" in takes(body) else {}
    return body(input_ids=ids[None], **switch)


def has_cache(body: Any) -> bool:
    """Whether a transformers model takes a KV cache; what it takes may yet not work."""
    return {"past_key_values", "use_cache"} <= takes(body)


@torch.inference_mode()
def greedy(model: Any, ids: torch.Tensor, count: int = GREEDY_TOKENS) -> torch.Tensor:
    """`count` greedy tokens after the prompt, shape (count,); end-of-text does not stop it.

    With a KV cache where the model has one that works. Others keep a state of another kind, each called otherwise,
    or none: they read the whole text again for each token.
    """
    body = plain(model)
    if has_cache(body):
        try:
            return _with_cache(body, ids, count)
        except _UNUSABLE:
            pass  # without a cache the model may run all the same; if not, that tells why
    out = ids
    for _ in range(count):
        out = torch.cat([out, _forward(model, out).logits[0, -1:].argmax(-1)])
    return out[len(ids) :]


def _with_cache(body: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    out, past, step = [], None, ids[None]
    for _ in range(count):
        result = body(input_ids=step, past_key_values=past, use_cache=True)
        past = result.past_key_values
        if past is None:
            raise ValueError("the model returns no cache")
        step = result.logits[:, -1].argmax(-1, keepdim=True)
        out.append(step[0])
    return torch.cat(out)


@torch.inference_mode()
def greedy_steps(model: Any, ids: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
    """Logits (count, vocabulary) at each step of a given continuation, in one forward."""
    steps: torch.Tensor = _forward(model, torch.cat([ids, continuation[:-1]])).logits[0, len(ids) - 1 :].float()
    return steps
