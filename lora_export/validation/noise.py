"""How far honest rounding alone moves a model: the yardstick for every threshold.

A merged weight is rounded to its type, so each of its elements is off by up to half a unit in the last place.
The noise floor is the base without any adapter, its adapted weights moved by such errors (uniform, seeded),
against the base itself. Rounding the base as it is would not do: a 16-bit base already lies on its grid.
"""

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lora_export.validation import streaming

DRAWS = 3  # the largest error over all positions varies by a fifth from draw to draw


@contextlib.contextmanager
def rounding_noise(unmerged: Any, dtypes: Mapping[str, torch.dtype], seed: int) -> Iterator[None]:
    """Inside, the adapted base weights carry rounding errors of the types in `dtypes` (by plain name).

    A weight's errors depend on its name and the seed alone, not on the order in which weights are read.
    """
    default = max(dtypes.values(), key=lambda d: torch.finfo(d).eps)

    def noise(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if ".base_layer." not in name or weight.dim() < 2 or _belongs_to_adapter(name):
            return None
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        dtype = dtypes.get(name.replace(".base_layer", ""), default)
        return (torch.rand(weight.shape, generator=generator) - 0.5) * _ulp(weight, dtype)

    def noisy(name: str, weight: torch.Tensor) -> torch.Tensor:
        errors = noise(name, weight)
        return weight if errors is None else weight + errors

    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    with streaming.changing(unmerged, noisy) as streamed:
        try:
            for name, parameter in unmerged.base_model.model.named_parameters():
                errors = None if streamed else noise(name, parameter.data)
                if errors is not None:
                    saved.append((parameter.data, parameter.data.clone()))
                    parameter.data += errors
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
