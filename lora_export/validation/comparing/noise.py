"""How far honest rounding alone moves a model: the yardstick for every threshold.

A merged weight is rounded to its type, so each of its elements is off by up to half a unit in the last place. The
noise floor is the *unmerged* model, its adapter active, whose adapted weights carry such errors (uniform, seeded),
against itself without them. Rounding the base as it is would not do: a 16-bit base already lies on its grid.
Weights without an adapter are rounded as they are, because that is what happens to them.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from lora_export.validation.reference import streaming
from lora_export.validation.reference.magnitude import Magnitudes

Measured = TypeVar("Measured")
DRAWS = 3  # the largest error over all positions varies by a fifth from draw to draw


@contextlib.contextmanager
def rounding_noise(
    unmerged: Any, dtypes: Mapping[str, torch.dtype], seed: int, sizes: Magnitudes | None = None
) -> Iterator[None]:
    """Inside, the base weights carry rounding errors of the types in `dtypes` (by plain name).

    sizes: how large the weights are with the adapter, which decides how large the errors are. A weight's errors
    depend on its name and the seed alone, not on the order in which weights are read.
    """
    types = {name: dtype for name, _, dtype in base_parameters(unmerged, dtypes)}
    known = sizes or Magnitudes.of(unmerged)

    def noisy(name: str, weight: torch.Tensor) -> torch.Tensor:
        dtype = types.get(name)
        if dtype is None:
            return weight
        if ".base_layer." not in name or weight.dim() < 2:
            return weight.to(dtype).float()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return weight + rounding_errors(known.adapted(name, weight), dtype, generator)

    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    with streaming.changing(unmerged, noisy):
        try:
            for name, parameter, _ in base_parameters(unmerged, dtypes):
                if streaming.slots_of(parameter):
                    continue
                weight = parameter.data
                changed = noisy(name, weight)
                if not torch.equal(changed, weight):
                    saved.append((weight, weight.clone()))
                    weight.copy_(changed)
            yield
        finally:
            for weight, before in saved:
                weight.copy_(before)


def draws(unmerged: Any, dtypes: Mapping[str, torch.dtype], measure: Callable[[], Measured]) -> list[Measured]:
    """What `measure` returns for the unmerged model under the rounding errors of each of DRAWS seeds."""
    sizes = Magnitudes.of(unmerged)
    measured = []
    for seed in range(DRAWS):
        with rounding_noise(unmerged, dtypes, seed, sizes):
            measured.append(measure())
    return measured


def rounding_errors(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Errors as rounding to `dtype` makes them: uniform, up to half a unit in the last place of each element."""
    return (torch.rand(weight.shape, generator=generator) - 0.5) * _ulp(weight, dtype)


def base_parameters(
    unmerged: Any, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, torch.nn.Parameter, torch.dtype]]:
    """(name, parameter, type in the output) of the base inside PEFT's wrappers."""
    default = max(dtypes.values(), key=lambda d: torch.finfo(d).eps)
    for name, parameter in unmerged.base_model.model.named_parameters():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        # What lies outside the innermost base layer is the adapter's: fused experts have wrappers in wrappers.
        if plain in dtypes or (".base_layer." in name and "." not in name.rpartition(".base_layer.")[2]):
            yield name, parameter, dtypes.get(plain, default)


def _ulp(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(weight)  # weight = m · 2^exponent with ½ ≤ |m| < 1
    return torch.ldexp(torch.full_like(weight, info.eps), exponent - 1).clamp_min(info.tiny * info.eps)
