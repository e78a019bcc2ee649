"""Attention as one operator of ONNX Runtime, inserted while the model is traced.

transformers asks an interface for attention and its mask. By answering with `com.microsoft::MultiHeadAttention`,
softmax and mask arithmetic never enter the graph, so no optimizer has to recognize them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

NAME = "onnxruntime"
HIDDEN = -10_000.0  # added where attention is not allowed: its exp is 0, and fp16 can hold it
_cached = [False]


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


@contextlib.contextmanager
def cached(yes: bool) -> Iterator[None]:
    """Inside, the operator gets keys and values in the cache's layout, (batch, heads, length, head size)."""
    before, _cached[0] = _cached[0], yes
    try:
        yield
    finally:
        _cached[0] = before


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query (batch, heads, length, size) → (batch, length, heads, size). The mask is from `mask`, or a bias."""
    batch, heads, length, size = query.shape
    if key.shape[1] != heads:
        groups = heads // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    bias = attention_mask if position_bias is None else _sum(position_bias, attention_mask)
    padding = None
    if bias is not None and bias.dim() == 2:
        padding, bias = bias, None
    inputs = [_flat(query), *((key, value) if _cached[0] else (_flat(key), _flat(value))), None, padding, bias]
    while inputs[-1] is None:
        inputs.pop()
    width = value.shape[-1]
    result = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        {"num_heads": heads, "scale": float(size**-0.5 if scaling is None else scaling)},
        dtype=query.dtype,
        shape=(batch, length, heads * width),
        version=1,
    )
    return result.reshape(batch, length, heads, width), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    **others: Any,
) -> torch.Tensor | None:
    """What may be attended to: None for everything; (batch, keys) int32 if only padding counts; else a bias (batch,
    1, queries, keys) of 0 and HIDDEN."""
    from transformers import masking_utils

    whole = mask_function in (None, masking_utils.bidirectional_mask_function)
    if whole:
        return None if attention_mask is None else attention_mask.to(torch.int32)
    queries = (torch.arange(q_length, device=device) + q_offset)[None, None, :, None]
    keys = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    assert mask_function is not None
    rows = torch.arange(batch_size, device=device)[:, None, None, None]  # pictures lie elsewhere in each row
    allowed = mask_function(rows, zero, queries, keys)
    if attention_mask is not None:
        allowed = allowed & attention_mask.to(torch.bool)[:, None, None, :]
    return torch.where(allowed, 0.0, HIDDEN).to(dtype)


def _sum(bias: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return bias
    if attention_mask.dim() == 2:
        attention_mask = (1 - attention_mask.to(bias.dtype))[:, None, None, :] * HIDDEN
    return bias + attention_mask


def _flat(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, size) → (batch, length, heads × size)."""
    batch, heads, length, size = states.shape
    return states.transpose(1, 2).reshape(batch, length, heads * size)
