"""Rotary embeddings as formulas of the positions, in real numbers.

Where frequencies follow the length, transformers changes its buffers while it runs: dynamic NTK in branches of
Python that tracing would settle for one length, LongRoPE in place. Two architectures multiply complex numbers.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def traceable(model: torch.nn.Module) -> Iterator[None]:
    """Inside, rotary embeddings of `model` compute their frequencies from the positions that they are given."""
    changed = {m: _forward(m) for m in model.modules() if _follows_length(m)}
    changed |= {m: _real_forward(m) for m in model.modules() if _is_complex(m)}
    before = {}
    for module, forward in changed.items():
        module.forward = forward
        found, axis = sys.modules[type(module).__module__], _COMPLEX.get(_architecture(module))
        if axis is not None and found not in before:
            before[found] = found.apply_rotary_emb
            found.apply_rotary_emb = _turning(axis)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        for found, function in before.items():
            found.apply_rotary_emb = function  # type: ignore[attr-defined]


# Architectures that turn pairs of numbers as complex ones, and the axis of heads when they do.
_COMPLEX = {"llama4": 2, "deepseek_v2": 1}


def _architecture(module: torch.nn.Module) -> str:
    return type(module).__module__.rpartition(".")[0].rpartition(".")[2]


def _is_complex(module: torch.nn.Module) -> bool:
    return _architecture(module) in _COMPLEX and type(module).__name__.endswith(
        ("TextRotaryEmbedding", "V2RotaryEmbedding")
    )


def _real_forward(module: Any) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(batch, length, half size, 2): cos and sin."""
        angles = position_ids[..., None].float() * module.inv_freq.float()
        return torch.stack([angles.cos(), angles.sin()], dim=-1) * float(module.attention_scaling)

    return forward


def _turning(axis: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def apply(query: torch.Tensor, key: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = table.unsqueeze(axis).unbind(-1)

        def turned(states: torch.Tensor) -> torch.Tensor:
            even, odd = states.float().reshape(*states.shape[:-1], -1, 2).unbind(-1)
            pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
            return pairs.flatten(3).type_as(states)

        return turned(query), turned(key)

    return apply


def _follows_length(module: torch.nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    wrapped = hasattr(type(module).forward, "__wrapped__")
    return wrapped and any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in named)


def _forward(module: Any) -> Callable[..., Any]:
    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        rotated = inspect.unwrap(type(module).forward)  # without what changes the buffers
        kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
        given = {} if layer_type is None else {"layer_type": layer_type}
        if "dynamic" not in kind and kind != "longrope":
            return rotated(module, x, position_ids, **given)
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        before = module._buffers[name]
        module._buffers[name] = _frequencies(module, kind, position_ids, layer_type)
        try:
            return rotated(module, x, position_ids, **given)
        finally:
            module._buffers[name] = before

    return forward


def _frequencies(module: Any, kind: str, position_ids: torch.Tensor, layer_type: str | None) -> torch.Tensor:
    """What transformers' buffer has after it has seen these positions, without those before them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = torch.max(position_ids) + 1
    given = {} if layer_type is None else {"layer_type": layer_type}
    own = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
    compute = ROPE_INIT_FUNCTIONS[kind]
    if kind != "longrope":
        return compute(module.config, position_ids.device, seq_len=length, **given)[0]  # type: ignore[no-any-return]
    original = own["original_max_position_embeddings"]
    short, long = (
        compute(module.config, position_ids.device, seq_len=n, **given)[0] for n in (original, original + 1)
    )
    return torch.where(length > original, long, short)
