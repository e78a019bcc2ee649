"""What PEFT's wrapper of nn.MultiheadAttention computes with, asked of the wrapper itself.

Its forward puts the weights in effect into torch's module, calls it, and takes them out again.
"""

import copy
from typing import Any

import torch
from torch import nn

Values = dict[str, tuple[torch.Tensor, torch.Tensor]]


def is_attention(module: Any) -> bool:
    get = getattr(module, "get_base_layer", None)
    return get is not None and isinstance(get(), nn.MultiheadAttention)


@torch.no_grad()
def in_effect(module: Any) -> Values:
    """Parameter → (the base's values, those that the wrapper computes with), in float64."""
    exact = copy.deepcopy(module).double()
    layer = exact.get_base_layer()
    before = _weights(layer)
    after: dict[str, torch.Tensor] = {}
    layer.register_forward_pre_hook(lambda *_: after.update(_weights(layer)))
    token = torch.zeros(1, 1, layer.embed_dim, dtype=torch.float64)
    exact(token, token, token)
    return {name: (before[name], after[name]) for name in before}


def _weights(layer: Any) -> dict[str, torch.Tensor]:
    """By the names of a plain module; the wrapper's own matrices left out."""
    out = layer.out_proj.get_base_layer()
    held = {"in_proj_weight": layer.in_proj_weight, "out_proj.weight": out.weight}
    held |= {"in_proj_bias": layer.in_proj_bias, "out_proj.bias": out.bias}
    held |= {"bias_k": layer.bias_k, "bias_v": layer.bias_v}
    return {name: value.detach().clone() for name, value in held.items() if value is not None}
