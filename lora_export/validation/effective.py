"""What PEFT's unmerged modules compute, asked of the modules themselves: no formula of any kind is known here.

A wrapped layer gets one-hot inputs: its answer to the i-th is the i-th column of the weight that it has in effect.
All in float64, one module at a time.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

SEED = 20_240_501
BLOCK = 512  # inputs at once, which bounds the memory
CHEAP = 0.25  # of the arithmetic of a product with the whole weight
IMPULSES_A_CHANNEL = 8  # where every channel of a convolution is asked


@dataclass(frozen=True)
class Probe:
    """inputs: what one layer is asked; zeros: what it answers with its bias alone (None for embeddings)."""

    inputs: torch.Tensor
    zeros: torch.Tensor | None


def wrapped_modules(model: nn.Module) -> dict[str, Any]:
    """Path → the outermost PEFT wrapper there. Paths are those of the plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in found)
        if not inside and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found[name] = module
    return found


def plain_parameters(model: nn.Module, wrapped: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters that no adapter kind computes: those outside all wrappers, and modules that were saved whole."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not any(name.startswith(f"{path}.") for path in wrapped):
            yield name, parameter
    for path, module in wrapped.items():
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[module.active_adapters[0]]
            for name, parameter in saved.named_parameters():
                yield f"{path}.{name}", parameter


def base_layer(module: Any) -> Any:
    """The plain layer inside a wrapper."""
    layer = module
    while hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        layer = layer.base_layer if hasattr(layer, "base_layer") else layer.token_adapter
    return layer


def make_probe(module: Any, count: int | None) -> Probe | None:
    """`count` one-hot inputs (None: all) for the layer inside a wrapper, or None for a layer of another type."""
    layer = base_layer(module)
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(layer, nn.Linear | Conv1D):
        width = layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]
        columns = _pick(width, count, generator)
        inputs = torch.zeros(len(columns), width, dtype=torch.float64)
        inputs[torch.arange(len(columns)), columns] = 1
        return Probe(inputs, torch.zeros(1, width, dtype=torch.float64))
    if isinstance(layer, nn.Embedding):
        rows = _pick(layer.num_embeddings, count, generator).tolist()
        return Probe(torch.tensor(sorted({*rows, *_trained_tokens(module)})), None)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _impulses(layer, count, generator)
    return None


def _pick(size: int, count: int | None, generator: torch.Generator) -> torch.Tensor:
    """Distinct indices below `size`, the first and the last among them."""
    if count is None or count >= size:
        return torch.arange(size)
    inner = torch.randperm(size, generator=generator)[: max(count - 2, 0)]
    return torch.tensor(sorted({0, size - 1, *inner.tolist()}))


def _trained_tokens(module: Any) -> set[int]:
    owners = (module, getattr(module, "token_adapter", None))
    indices = (getattr(owner, "token_indices", None) or {} for owner in owners)
    return {i for named in indices for ids in named.values() for i in ids}


def _impulses(layer: Any, count: int | None, generator: torch.Generator) -> Probe:
    """Images that are zero but for one element, at places from which every tap of the kernel can be reached."""
    sizes = _field(layer)
    channels = torch.arange(layer.in_channels).repeat(IMPULSES_A_CHANNEL)
    if count is not None and count < len(channels):
        channels = channels[torch.randperm(len(channels), generator=generator)[:count]]
    inputs = torch.zeros(len(channels), layer.in_channels, *sizes, dtype=torch.float64)
    places = [torch.randint(0, n, (len(channels),), generator=generator) for n in sizes]
    inputs[(torch.arange(len(channels)), channels, *places)] = 1
    return Probe(inputs, torch.zeros(1, layer.in_channels, *sizes, dtype=torch.float64))


def _field(layer: Any) -> list[int]:
    """The size of an image from whose places every tap of the kernel can be reached."""
    taps = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    return [d * (k - 1) + 1 + s for k, s, d in taps]


@torch.no_grad()
def answers(module: Any, exact: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(answers of `exact`, the module's copy in float64; the fp32 deviation of the module itself).

    The deviation is the largest difference between the module's own float32 arithmetic and its float64 one.
    """
    found = exact(inputs)
    narrow = inputs.float() if inputs.is_floating_point() else inputs
    return found, float((module(narrow).double() - found).abs().max())


class OneHot:
    """One-hot inputs for every element of a weight, block by block, answered without a product of matrices.

    What a plain layer computes for a one-hot input is a column of its weight. Layers that `speak_for` was told of
    answer so, but only to the very inputs of the block; whatever else a wrapper asks, the layer itself answers.
    """

    def __init__(self, layer: Any) -> None:
        self._width = layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]
        self._inputs: torch.Tensor | None = None
        self._columns = slice(0)

    def speak_for(self, layer: Any) -> None:
        plain = layer.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x is not self._inputs:
                answer: torch.Tensor = plain(x)
                return answer
            linear = isinstance(layer, nn.Linear)
            columns = layer.weight[:, self._columns].T if linear else layer.weight[self._columns]
            chosen: torch.Tensor = columns.clone() if layer.bias is None else columns + layer.bias
            return chosen

        layer.forward = forward

    def blocks(self) -> Iterator[torch.Tensor]:
        """Inputs (up to BLOCK, width) in float64, each to be asked before the next is taken."""
        for start in range(0, self._width, BLOCK):
            stop = min(start + BLOCK, self._width)
            self._columns = slice(start, stop)
            self._inputs = torch.zeros(stop - start, self._width, dtype=torch.float64)
            self._inputs[torch.arange(stop - start), torch.arange(start, stop)] = 1
            yield self._inputs


def cheap_probes(exact: Any, *others: nn.Module) -> Iterator[torch.Tensor] | None:
    """Inputs that together ask for every element of a weight; None if that is too much arithmetic.

    exact: a wrapper in float64; others: plain layers that are asked the same. It is too much where the wrapper
    multiplies by more than its low ranks, because it turns the inputs or builds a whole matrix anew.
    """
    layer = base_layer(exact)
    if isinstance(layer, nn.Embedding):
        return iter(torch.split(torch.arange(layer.num_embeddings), BLOCK))
    if not isinstance(layer, nn.Linear | Conv1D):
        return None
    one_hot = OneHot(layer)
    for speaker in (layer, *others):
        one_hot.speak_for(speaker)
    first = next(one_hot.blocks())
    with FlopCounterMode(display=False) as counter:
        exact(first)
    if counter.get_total_flops() < CHEAP * 2 * len(first) * layer.weight.numel():
        return one_hot.blocks()
    for speaker in (layer, *others):
        del speaker.forward  # the class's own again
    return None


def random_signs(exact: Any, count: int) -> torch.Tensor:
    """`count` inputs of ±1 for the layer inside a wrapper, so that all elements of its weight take part."""
    layer = base_layer(exact)
    if isinstance(layer, nn.Linear | Conv1D):
        shape: tuple[int, ...] = (layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0],)
    else:
        shape = (layer.in_channels, *_field(layer))
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, (count, *shape), generator=generator)
    return signs.double() * 2 - 1


@torch.no_grad()
def effective_parameters(module: Any) -> dict[str, torch.Tensor]:
    """Name → the parameter that is in effect inside PEFT's wrappers of parameters, in float64."""
    outer = copy.deepcopy(module).double()
    with contextlib.ExitStack() as stack:
        names, layer = [], outer
        while hasattr(layer, "parameter_name"):
            names.append(layer.parameter_name)
            stack.enter_context(layer._activate_lora(layer.active_adapters))
            layer = layer.base_layer
        return {name: getattr(layer, name).detach().clone() for name in names}
