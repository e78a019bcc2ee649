"""Modules that compute the same in a way that can be traced: the exceptions, each with its reason."""

import functools
from typing import Any

import torch


def prepare(model: Any) -> None:
    """Replace what a trace would fix to the length that it saw.

    LED's (and Longformer's) windows are cut out of the states in pieces, whose number depends on the length, and
    which tokens see all others decides over the program. Without such tokens, as transformers runs the model
    unless it is told otherwise, the windows are a band in an attention of the whole length.

    Switch's experts are visited one by one, those that a token was sent to. All of them, with a share of 0 for the
    others, are the same sum for every routing.
    """
    for module in model.modules():
        if hasattr(module, "one_sided_attn_window_size"):
            module.forward = functools.partial(_banded, module)
        if hasattr(module, "_pad_to_window_size"):  # a band has no need of whole windows
            module._pad_to_window_size = _unpadded
        if type(module).__name__ == "SwitchTransformersExperts":
            module.forward = functools.partial(_every_expert, module)
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.classifier.to = functools.partial(_as_it_is, module.classifier)  # fp32, which it is


def _unpadded(pad_token_id: int, **given: Any) -> tuple[Any, ...]:
    return 0, *given.values()


def _banded(
    module: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
) -> tuple[torch.Tensor]:
    """states (batch, length, width) → the same shape. attention_mask (batch, length): 0 where a token counts."""
    batch, length, width = hidden_states.shape
    sizes = (batch, length, module.num_heads, module.head_dim)
    query, key, value = (
        projection(hidden_states).view(sizes).transpose(1, 2)
        for projection in (module.query, module.key, module.value)
    )
    places = torch.arange(length, device=hidden_states.device)
    near = (places[:, None] - places[None]).abs() <= module.one_sided_attn_window_size
    allowed = near[None, None]
    if attention_mask is not None:
        allowed = allowed & (attention_mask == 0)[:, None, None, :]
    bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min).to(query.dtype)
    result = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return (result.transpose(1, 2).reshape(batch, length, width),)


def _every_expert(
    module: Any, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    """states (tokens, width) → the same shape. selected_experts (tokens, 1, experts) of 0 and 1, routing_weights
    (tokens, 1)."""
    shares = (selected_experts * routing_weights[..., None]).sum(1)
    result = torch.zeros_like(hidden_states)
    for i in range(module.num_experts):
        result = result + module[f"expert_{i}"](hidden_states) * shares[:, i : i + 1]
    return result


def _as_it_is(module: Any, *dtype: torch.dtype) -> Any:
    return module
