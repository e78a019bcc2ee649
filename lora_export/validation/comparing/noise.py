"""How far honest rounding alone moves a model: the yardstick for every threshold.

A merged weight is rounded to its type, so each of its elements is off by up to half a unit in the last place. The
noise floor is the *unmerged* model, its adapter active, whose adapted weights carry such errors (uniform, seeded),
against itself without them. Rounding the base as it is would not do: a 16-bit base already lies on its grid.
Weights without an adapter are rounded as they are, because that is what happens to them.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export.validation.reference import streaming
from lora_export.validation.reference.probes import base_layer, generator_of, random_signs, wrapped_modules
from lora_export.validation.reference.whole import effective_blocks, wrapped_parameters

Measured = TypeVar("Measured")
DRAWS = 3  # the largest error over all positions varies by a fifth from draw to draw
SIGNS = 64  # inputs: the mean square of an output is then known to about 18 %
SEED = 20_240_501
ROWS = 256  # of an embedding
EXPONENT = 0x7F80_0000  # its bits in an fp32 number


@dataclass(frozen=True)
class Magnitudes:
    """How large the weights of PEFT's wrapped layers are with their adapters, which the size of their rounding
    errors follows.

    The layers are asked, not their formulas: random signs in, and the mean square of an output is the sum of the
    squares of the row of weights that made it. rows: of each weight, by its name in the wrapped model, the mean
    squares of its rows without the adapter and with it, each (out,) or a scalar.
    """

    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, unmerged: Any) -> "Magnitudes":
        """Ask every wrapped layer of the unmerged model. A layer of an unknown type is left out."""
        model, rows = unmerged.base_model.model, {}
        for path, module in wrapped_modules(model).items():
            with streaming.present(module):
                rows.update({f"{path}.{name}": sizes for name, sizes in sizes_of(module)})
        return cls(rows)

    def adapted(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Magnitudes of the elements of `weight` as they are with the adapter, rows in proportion.

        Where the adapter adds to a row, every element gets its share of what is added; where it shrinks a row, the
        elements shrink alike.
        """
        sizes = self.rows.get(name)
        if sizes is None:
            return weight
        before, after = (x.reshape(x.shape + (1,) * (weight.dim() - x.dim())) if x.dim() else x for x in sizes)
        if before.dim() and before.shape[0] != weight.shape[0]:  # GPT-2 keeps outputs last
            before, after = before.reshape(1, -1), after.reshape(1, -1)
        shrunk = (after / before.clamp_min(1e-38)).clamp(max=1.0)
        return (weight.square() * shrunk + (after - before).clamp_min(0)).sqrt()


def sizes_of(module: Any) -> list[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    layer = base_layer(module)
    path = next(n for n, m in module.named_modules() if m is layer)
    if hasattr(module, "parameter_name"):
        return [(f"{path}.{name}", _of_parameter(module, name)) for name in wrapped_parameters(module)]
    if isinstance(layer, nn.Embedding):
        rows = torch.linspace(0, layer.num_embeddings - 1, ROWS).long()
        return [(f"{path}.weight", (_mean(layer(rows)), _mean(module(rows))))]
    if not isinstance(layer, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return []
    return [(f"{path}.weight", _rows(module, layer))]


def _of_parameter(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a stacked parameter as a whole."""
    sums, count = torch.zeros(2), 0
    for _, before, after in effective_blocks(module, name):
        sums += torch.stack([before.square().sum(), after.square().sum()]).float()
        count += before.numel()
    return sums[0] / count, sums[1] / count


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean()


def _rows(module: Any, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squares of the weights that make each output, (out,), without and with the adapter."""
    signs = random_signs(module, SIGNS, generator_of(SEED, "signs")).float()
    plain, adapted = (_output_squares(m, layer, signs) for m in (layer, module))
    weight = layer.weight.detach()
    before = (weight.T if isinstance(layer, Conv1D) else weight).square().flatten(1).mean(1)
    scale = torch.where(plain > 0, before / plain.clamp_min(1e-38), plain.numel() / weight.numel())
    return before, adapted * scale


def _output_squares(module: Any, layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    answers: torch.Tensor = module(inputs) - module(torch.zeros_like(inputs[:1]))
    axis = -1 if isinstance(layer, nn.Linear | Conv1D) else 1
    return answers.square().transpose(axis, -1).reshape(-1, answers.shape[axis]).mean(0)


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
        return rounding_errors(known.adapted(name, weight), dtype, generator).add_(weight)

    with streaming.changing(unmerged, noisy):
        yield


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
    return torch.rand(weight.shape, generator=generator).sub_(0.5).mul_(_ulp(weight, dtype))


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
    below = (weight.view(torch.int32) & EXPONENT).view(torch.float32)  # the power of two below each element
    below.masked_fill_(weight == 0, 0.5)  # with the adapter it is some small number, nobody knows which
    return below.mul_(info.eps).clamp_min_(info.tiny * info.eps)
