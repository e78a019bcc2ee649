"""How large the weights of PEFT's wrapped layers are with their adapters: the size of a rounding error follows it.

The layers are asked, not their formulas: random signs in, and the mean square of an output is the sum of the
squares of the row of weights that made it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export.validation.comparing.whole import effective_blocks, wrapped_parameters
from lora_export.validation.reference.probes import base_layer, generator_of, random_signs, wrapped_modules
from lora_export.validation.reference.streaming import present

SIGNS = 64  # inputs: the mean square of an output is then known to about 18 %
SEED = 20_240_501
ROWS = 256  # of an embedding


@dataclass(frozen=True)
class Magnitudes:
    """For each weight of a wrapped layer, by its name in the wrapped model: (mean squares of its rows without the
    adapter, with it), each (out,) or a scalar."""

    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, unmerged: Any) -> "Magnitudes":
        """Ask every wrapped layer of the unmerged model. A layer of an unknown type is left out."""
        model, rows = unmerged.base_model.model, {}
        for path, module in wrapped_modules(model).items():
            with present(module):
                rows.update({f"{path}.{name}": sizes for name, sizes in _sizes(module)})
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


def _sizes(module: Any) -> list[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
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
