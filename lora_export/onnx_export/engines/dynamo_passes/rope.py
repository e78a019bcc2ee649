"""Rotary embeddings whose frequencies follow the length, as formulas of the positions.

transformers changes its buffers while it runs: dynamic NTK in branches of Python that tracing would settle for one
length, LongRoPE in place.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def traceable(model: torch.nn.Module) -> Iterator[None]:
    """Inside, rotary embeddings of `model` compute their frequencies from the positions that they are given."""
    changed = [m for m in model.modules() if _follows_length(m)]
    for module in changed:
        module.forward = _forward(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _follows_length(module: torch.nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    wrapped = hasattr(type(module).forward, "__wrapped__")
    return wrapped and any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in named)


def _forward(module: Any) -> Callable[..., Any]:
    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        rotated = type(module).forward.__wrapped__
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
