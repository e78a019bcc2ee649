"""The weight that an adapted layer has in effect, asked of the layer by one-hot inputs, in float64."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_export.validation.pipelines.activations import CONVOLUTIONS, Adapted
from lora_export.validation.reference.whole import OneHot, without_geometry

BLOCK = 512


def in_double(adapted: Adapted) -> Adapted:
    """A copy of a layer in float64, of which a convolution asks for single elements of its filters."""
    exact = copy.deepcopy(adapted).double()
    if isinstance(exact.base_layer, CONVOLUTIONS):
        without_geometry(exact)
    return exact


@torch.no_grad()
def columns(exact: Adapted, most: float = float("inf")) -> Iterator[tuple[slice, torch.Tensor]]:
    """(which of the flat inputs: channel and tap, or token; their columns of the weight in effect, (inputs,
    outputs)), block by block. exact: as `in_double` makes it; most: multiplications for all of them, beyond which
    nothing is yielded."""
    layer: Any = exact.base_layer
    if isinstance(layer, nn.Embedding):
        for start in range(0, layer.num_embeddings, BLOCK):
            where = slice(start, min(start + BLOCK, layer.num_embeddings))
            yield where, exact(torch.arange(where.start, where.stop))
        return
    bias, one_hot, start = constant(exact), OneHot(layer), 0
    alone = getattr(layer, "groups", 1) == 1
    if alone:
        one_hot.speak_for(layer)
    try:
        for inputs in one_hot.blocks():
            if start == 0 and _multiplications(exact, inputs) * width_of(layer) / len(inputs) > most:
                return
            yield slice(start, start + len(inputs)), exact(inputs).flatten(1) - bias
            start += len(inputs)
    finally:
        if alone:
            del layer.forward  # the class's own again


@torch.no_grad()
def some_columns(exact: Adapted, which: torch.Tensor) -> torch.Tensor:
    """Columns of the weight in effect, (inputs, outputs). which: of the flat inputs."""
    layer: Any = exact.base_layer
    inputs = torch.zeros(len(which), width_of(layer), dtype=torch.float64)
    inputs[torch.arange(len(which)), which] = 1
    return responses(exact, inputs)


def responses(exact: Adapted, flat: torch.Tensor) -> torch.Tensor:
    """What a layer without its bias makes of flat inputs (…, channels and taps), (…, outputs)."""
    layer: Any = exact.base_layer
    kernel = layer.kernel_size if isinstance(layer, CONVOLUTIONS) else ()
    inputs = flat.reshape(len(flat), -1, *kernel) if kernel else flat
    answers: torch.Tensor = exact(inputs).flatten(1) - constant(exact).to(flat.dtype)
    return answers


def by_inputs(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A weight as a flat matrix of all its columns, (channels and taps, outputs); an embedding's as it is."""
    if isinstance(layer, nn.Embedding):
        return weight
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return weight.flatten(1).T
    dense: torch.Tensor = torch.block_diag(*(block.flatten(1) for block in weight.chunk(groups)))  # type: ignore[no-untyped-call]
    return dense.T


def width_of(layer: Any) -> int:
    """How many columns a weight has."""
    if isinstance(layer, nn.Embedding):
        return int(layer.num_embeddings)
    return int(layer.weight[0].numel()) * int(getattr(layer, "groups", 1))


def _multiplications(exact: Adapted, inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        exact(inputs)
    return int(counter.get_total_flops()) // 2


@torch.no_grad()
def constant(exact: Adapted) -> torch.Tensor:
    """The bias in effect, (outputs,), zeros where there is none. exact: as `in_double` makes it."""
    layer: Any = exact.base_layer
    if isinstance(layer, CONVOLUTIONS):
        shape: tuple[int, ...] = (layer.in_channels, *layer.kernel_size)
    else:
        shape = (layer.weight.shape[1],)
    answer: torch.Tensor = exact(torch.zeros(1, *shape, dtype=layer.weight.dtype))
    return answer.flatten()


def squares(adapted: Adapted) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares of the weight in effect: of each output, and of each input channel."""
    layer: Any = adapted.base_layer
    taps = layer.weight[0, 0].numel() if isinstance(layer, CONVOLUTIONS) else 1
    each = [(c.square().sum(0), c.square().sum(1)) for _, c in columns(in_double(adapted))]
    inputs = torch.cat([i for _, i in each])
    return torch.stack([o for o, _ in each]).sum(0), inputs.reshape(-1, taps).sum(1)
