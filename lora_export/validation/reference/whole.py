"""Every element of a weight, asked of PEFT's own modules block by block, so that memory stays bounded.

A plain layer answers a one-hot input with a column of its weight. Answering so, without a product of matrices,
leaves only what the adapter adds, which is cheap for updates of a low rank. No formula of any kind is known here.
"""

import copy
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from lora_export.validation.reference.probes import base_layer, width_of

BLOCK = 512  # inputs at once
PARAMETER_BLOCK = 2**22  # elements of a stacked parameter at once
CHEAP = 0.25  # of the arithmetic of a product with the whole weight
Factors = tuple[torch.Tensor, torch.Tensor, float]
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


class OneHot:
    """One-hot inputs for every element of a weight, block by block, answered without a product of matrices.

    Layers that `speak_for` was told of answer by their columns, but only to the very inputs of the block; whatever
    else a wrapper asks, the layer itself answers.
    """

    def __init__(self, layer: Any) -> None:
        if isinstance(layer, _CONVOLUTIONS):
            self._shape: tuple[int, ...] = (layer.in_channels, *layer.kernel_size)
        else:
            self._shape = (width_of(layer),)
        self._inputs: torch.Tensor | None = None
        self._columns = slice(0)

    def speak_for(self, layer: Any) -> None:
        plain = layer.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x is not self._inputs:
                answer: torch.Tensor = plain(x)
                return answer
            columns = _by_inputs(layer)[self._columns]
            chosen: torch.Tensor = columns.clone() if layer.bias is None else columns + layer.bias
            return chosen.reshape(*chosen.shape, *(1 for _ in self._shape[1:]))

        layer.forward = forward

    def blocks(self) -> Iterator[torch.Tensor]:
        """Inputs (up to BLOCK, …) in float64, each to be asked before the next is taken."""
        width = prod(self._shape)
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            self._columns = slice(start, stop)
            inputs = torch.zeros(stop - start, width, dtype=torch.float64)
            inputs[torch.arange(stop - start), torch.arange(start, stop)] = 1
            self._inputs = inputs.reshape(-1, *self._shape)
            yield self._inputs


def _by_inputs(layer: Any) -> torch.Tensor:
    """The weight of a plain layer, (inputs, outputs)."""
    weight: torch.Tensor = layer.weight
    return weight if isinstance(layer, Conv1D) else weight.flatten(1).T


def whole_probes(exact: Any, *others: nn.Module) -> Iterator[torch.Tensor] | None:
    """Inputs that together ask for every element of a weight; None if that is too much arithmetic.

    exact: a wrapper in float64; others: plain layers that are asked the same. All of them may be changed: they are
    of use for these inputs only. It is never too much for LoRA. For other kinds it is where the wrapper multiplies
    by more than low ranks, because it turns the inputs or builds a whole matrix anew.
    """
    layer = base_layer(exact)
    if isinstance(layer, nn.Embedding):
        return iter(torch.split(torch.arange(layer.num_embeddings), BLOCK))
    if not isinstance(layer, nn.Linear | Conv1D | _CONVOLUTIONS):
        return None
    if isinstance(layer, _CONVOLUTIONS):
        if not low_rank(exact):
            return None
        for owner in (exact, *others):
            without_geometry(owner)
    one_hot = OneHot(layer)
    if getattr(layer, "groups", 1) == 1:
        for speaker in (layer, *others):
            one_hot.speak_for(speaker)
    if low_rank(exact) or _cheap(exact, next(one_hot.blocks()), layer.weight):
        return one_hot.blocks()
    for speaker in (layer, *others):
        del speaker.forward  # the class's own again
    return None


def low_rank(module: Any) -> bool:
    return isinstance(module, LoraLayer)


def _cheap(exact: Any, inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    with FlopCounterMode(display=False) as counter:
        exact(inputs)
    return bool(counter.get_total_flops() < CHEAP * 2 * len(inputs) * weight.numel())


def without_geometry(owner: nn.Module) -> None:
    """Stride, padding and dilation are not the weight's: without them an image of the kernel's size has one answer,
    and a one-hot image asks for one element of each filter."""
    for module in owner.modules():
        if isinstance(module, _CONVOLUTIONS):
            module.stride = module.dilation = (1,) * len(module.kernel_size)
            module.padding, module.padding_mode = (0,) * len(module.kernel_size), "zeros"


@torch.no_grad()
def effective_blocks(module: Any, name: str) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(where, the base's values, those in effect) of a parameter inside PEFT's wrappers of parameters, in float64.

    Blocks of its first dimension, which counts experts. The wrapper's own arithmetic makes them: it is given a
    block of the parameter, and that part of its factors.
    """
    base = module.get_base_layer()
    values = getattr(base, name).data
    left_out = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in base.parameters()}
    outer = copy.deepcopy(module, left_out).double()
    wrapper = next(w for w in _wrappers(outer) if w.parameter_name == name)
    experts = values.dim() == 3 and len(values) > 1
    step = max(1, PARAMETER_BLOCK // values[0].numel()) if experts else len(values)
    factors = wrapper.get_delta_factors
    for start in range(0, len(values), step):
        where = slice(start, start + step)
        if experts:
            wrapper.get_delta_factors = lambda adapter, w=where: _part(factors(adapter), w)
        block = values[where].double()
        yield where, block, _in_effect(wrapper, name, block)


def _part(factors: Factors, where: slice) -> Factors:
    left, right, scaling = factors
    return left[where], right[where], scaling


def _in_effect(wrapper: Any, name: str, block: torch.Tensor) -> torch.Tensor:
    """Adapters one after the other: for several at once the wrapper would make the whole delta of each."""
    layer = wrapper.get_base_layer()
    for adapter in wrapper.active_adapters:
        setattr(layer, name, nn.Parameter(block, requires_grad=False))
        with wrapper._activate_lora([adapter]):
            block = getattr(layer, name).detach().clone()
    return block


def wrapped_parameters(module: Any) -> list[str]:
    """Names of the parameters that PEFT's wrappers change."""
    return [w.parameter_name for w in _wrappers(module)]


def _wrappers(outer: Any) -> Iterator[Any]:
    layer = outer
    while hasattr(layer, "parameter_name"):
        yield layer
        layer = layer.base_layer
