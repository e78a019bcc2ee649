"""Recurrences over the tokens as one operator of ONNX Runtime: state space models and linear attention.

transformers computes them by chunks of tokens, in loops that tracing would unroll for one length. Its functions
have the same names and arguments in every architecture, so they are replaced while a model is traced. All are
`com.microsoft::LinearAttention`, S ← exp(decay) S + key ⊗ value, out = scale · query S, for each head; the delta
rules take away first what the state already says of the value.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

_read: list[torch.Tensor | None] = [None]  # the state that a layer has asked its cache for last


@contextlib.contextmanager
def replaced(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the modules of `model` find these functions instead of transformers' own."""
    before = []
    for module in {type(m).__module__ for m in model.modules()}:
        found = sys.modules[module]
        for name, function in _FUNCTIONS.items():
            if hasattr(found, name):
                before.append((found, name, getattr(found, name)))
                setattr(found, name, function)
    try:
        yield
    finally:
        for found, name, function in before:
            setattr(found, name, function)


def remember_state(state: torch.Tensor | None) -> torch.Tensor | None:
    """Keep a state that a layer reads: Mamba's scan starts from nothing in transformers, so it is not given one."""
    _read[0] = state
    return state


def _recurrence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor | None,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key (batch, length, heads, k); value (…, heads, v); decay (…, heads) or (…, heads, k), its logarithm;
    beta (…, heads); state (batch, heads, k, v). Returns what value and state are like."""
    batch, length, heads, size = value.shape
    inputs: list[Any] = [x.reshape(batch, length, -1) for x in (query, key, value)]
    inputs += [state, decay.reshape(batch, length, -1)]
    if beta is not None:
        inputs.append(beta)
    rule = "gated" if beta is None else "gated_delta"
    out, present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        inputs,
        {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": rule, "scale": scale},
        dtypes=(value.dtype, value.dtype),
        shapes=((batch, length, heads * size), (batch, heads, key.shape[-1], size)),
        version=1,
    )
    return out.reshape(batch, length, heads, size), present


def _mamba2(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: Any,
) -> Any:
    """hidden_states (batch, length, heads, v); dt (…, heads); B, C (…, groups, k); states (batch, heads, v, k)."""
    heads, groups = hidden_states.shape[2], B.shape[2]
    steps = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        steps = torch.nn.functional.softplus(steps)
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        steps = torch.clamp(steps, min=dt_limit[0], max=dt_limit[1])
    key, query = (x.repeat_interleave(heads // groups, dim=2) for x in (B, C))
    state = None if initial_states is None else initial_states.transpose(2, 3)
    out, present = _recurrence(query, key, hidden_states * steps[..., None], state, A * steps, None, 1.0)
    if D is not None:
        out = out + hidden_states * D[..., None]
    return (out, present.transpose(2, 3)) if return_final_states else out


def _mamba(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: Any,
) -> Any:
    """hidden_states, dt (batch, channels, length); A (channels, k); B, C (batch, k, length). A head per channel."""
    batch, channels, length = hidden_states.shape
    steps = dt if delta_bias is None else dt + delta_bias[..., None]
    if delta_softplus:
        steps = torch.nn.functional.softplus(steps)
    steps, values = steps.transpose(1, 2), hidden_states.transpose(1, 2)
    key, query = (x.transpose(1, 2)[:, :, None].expand(batch, length, channels, A.shape[1]) for x in (B, C))
    state = None if _read[0] is None else _read[0][..., None]
    out, present = _recurrence(query, key, (values * steps)[..., None], state, A * steps[..., None], None, 1.0)
    scanned = out[..., 0].transpose(1, 2)
    if D is not None:
        scanned = scanned + hidden_states * D[None, :, None]
    if z is not None:
        scanned = scanned * torch.nn.functional.silu(z)
    return (scanned, present[..., 0]) if return_last_state else scanned


def _delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query, key (batch, length, heads or fewer, k); value (…, heads, v); g (…, heads), or Kimi's (…, heads, k)."""
    groups = value.shape[2] // key.shape[2]
    if groups > 1:
        query, key = (x.repeat_interleave(groups, dim=2) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    out, present = _recurrence(query, key, value, initial_state, g, beta, key.shape[-1] ** -0.5)
    return out, present if output_final_state else None


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba,
    "torch_chunk_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
}
