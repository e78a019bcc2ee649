"""How far honest rounding alone moves a model: the yardstick for every threshold.

A merged weight is rounded to its type, so each of its elements is off by up to half a unit in the last place.
The noise floor is the base without any adapter, its adapted weights moved by such errors (uniform, seeded),
against the base itself. Rounding the base as it is would not do: a 16-bit base already lies on its grid.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

DRAWS = 3  # the largest error over all positions varies by a fifth from draw to draw


@contextlib.contextmanager
def rounding_noise(unmerged: Any, dtypes: Mapping[str, torch.dtype], seed: int) -> Iterator[None]:
    """Inside, the adapted base weights carry rounding errors of the types in `dtypes` (by plain name)."""
    generator = torch.Generator().manual_seed(seed)
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    default = max(dtypes.values(), key=lambda d: torch.finfo(d).eps)
    try:
        for name, parameter in unmerged.base_model.model.named_parameters():
            if ".base_layer." not in name or parameter.dim() < 2 or _belongs_to_adapter(name):
                continue
            weight = parameter.data
            saved.append((weight, weight.clone()))
            dtype = dtypes.get(name.replace(".base_layer", ""), default)
            noise = torch.rand(weight.shape, generator=generator) - 0.5
            weight += noise * _ulp(weight, dtype)
        yield
    finally:
        for weight, before in saved:
            weight.copy_(before)


def _belongs_to_adapter(name: str) -> bool:
    """What lies outside the innermost base layer is the adapter's: fused experts have wrappers in wrappers."""
    return "." in name.rpartition(".base_layer.")[2]


def _ulp(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(weight)  # weight = m · 2^exponent with ½ ≤ |m| < 1
    return torch.ldexp(torch.full_like(weight, info.eps), exponent - 1).clamp_min(info.tiny * info.eps)
