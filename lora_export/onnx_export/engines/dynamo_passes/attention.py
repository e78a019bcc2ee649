"""Attention as one operator of ONNX Runtime, inserted while the model is traced.

transformers asks an interface for attention and its mask. By answering with `com.microsoft::MultiHeadAttention`,
softmax and mask arithmetic never enter the graph, so no optimizer has to recognize them.
"""

import contextlib
import sys
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


def in_torch() -> contextlib.AbstractContextManager[Any]:
    """Inside, torch's own scaled_dot_product_attention is the operator: diffusers asks no interface."""
    from lora_export.onnx_export.engines.trace_patches import Replaced

    return Replaced({torch.nn.functional.scaled_dot_product_attention: _scaled_dot_product})


def _scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *dropout: Any,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Any:
    """(batch, heads, length, size) → the same shape; torch's own where a mask or a rule comes with it."""
    if attn_mask is not None or is_causal or query.dim() != 4 or dropout or others.get("enable_gqa"):
        return NotImplemented
    result, _ = attention(torch.nn.Identity(), query, key, value, None, scaling=scale)
    return result.transpose(1, 2)


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query (batch, heads, length, size) → (batch, length, heads, size). The mask is from `mask`, or a bias.

    softcap: scores pass through softcap · tanh(score / softcap), which the operator does not have: the model's own
    function computes them. s_aux (heads): a score of each head that takes its share of attention and gives nothing.
    """
    batch, heads, length, size = query.shape
    if softcap is not None:
        own = sys.modules[type(module).__module__].eager_attention_forward
        bias = _as_bias(attention_mask, query.dtype)
        result, _ = own(module, query, key, value, bias, scaling=scaling, softcap=softcap, **others)
        return result, None
    bias = attention_mask if position_bias is None else _sum(position_bias, attention_mask)
    if s_aux is not None:
        key, value, bias = _with_sink(key, value, bias, s_aux, length)
    groups, width = heads // key.shape[1], value.shape[-1]
    if _cached[0] and width != size:  # the operator takes them from a cache in one size only
        query, key, value = (_widened(x, max(width, size)) for x in (query, key, value))
    if groups > 1:
        bias = _folded_bias(bias, groups)
    padding = None
    if bias is not None and bias.dim() == 2:
        padding, bias = bias, None
    inputs = [
        _folded(query, groups),
        *((key, value) if _cached[0] else (_flat(key), _flat(value))),
        None,
        padding,
        bias,
    ]
    while inputs[-1] is None:
        inputs.pop()
    result = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        {"num_heads": heads // groups, "scale": float(size**-0.5 if scaling is None else scaling)},
        dtype=query.dtype,
        shape=(batch, length * groups, heads // groups * value.shape[-1]),
        version=1,
    )
    result = result.reshape(batch, groups, length, heads // groups, value.shape[-1])
    if width != value.shape[-1]:
        result = result[..., :width]
    if groups > 1:
        result = result.permute(0, 2, 3, 1, 4)
    return result.reshape(batch, length, heads, width), None


def _widened(states: torch.Tensor, size: int) -> torch.Tensor:
    """With zeros up to this size."""
    more = size - states.shape[-1]
    return torch.nn.functional.pad(states, (0, more)) if more else states


def _folded(query: torch.Tensor, groups: int) -> torch.Tensor:
    """(batch, heads, length, size) → (batch, groups × length, heads of keys × size).

    Heads that share keys and values become more queries of one head, so that keys and values are not repeated.
    """
    if groups == 1:
        return _flat(query)
    batch, heads, length, size = query.shape
    apart = query.transpose(1, 2).reshape(batch, length, heads // groups, groups, size)
    return apart.permute(0, 3, 1, 2, 4).reshape(batch, groups * length, heads // groups * size)


def _folded_bias(bias: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """(batch, heads or 1, queries, keys) for the queries that `_folded` makes."""
    if bias is None or bias.dim() == 2:
        return bias
    batch, heads, queries, keys = bias.shape
    if heads > 1:
        return bias.reshape(batch, heads // groups, groups * queries, keys)
    return bias if queries == 1 else bias.repeat(1, 1, groups, 1)


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
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    assert mask_function is not None
    allowed = mask_function(rows, torch.zeros_like(rows[:1]), queries, keys)
    if attention_mask is not None:
        allowed = allowed & attention_mask.to(torch.bool)[:, None, None, :]
    return torch.where(allowed, 0.0, HIDDEN).to(dtype)


def _sum(bias: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    more = _as_bias(attention_mask, bias.dtype)
    return bias if more is None else bias + more


def _as_bias(attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """(batch, 1, queries or 1, keys), to be added to scores."""
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask
    return (1 - attention_mask.to(dtype))[:, None, None, :] * HIDDEN


def _with_sink(
    key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, sink: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One more key, which is zero and has its score as a bias, and its value, which is zero."""
    batch, _, keys, _ = key.shape
    heads = sink.shape[0]
    bias = _as_bias(mask, key.dtype)
    whole = (batch, heads, length, keys)
    bias = torch.zeros(whole, dtype=key.dtype) if bias is None else bias.expand(whole)
    more = sink.to(key.dtype).reshape(1, heads, 1, 1).expand(batch, heads, length, 1)
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return key, value, torch.cat([bias, more], dim=-1)


def _flat(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, size) → (batch, length, heads × size)."""
    batch, heads, length, size = states.shape
    return states.transpose(1, 2).reshape(batch, length, heads * size)
