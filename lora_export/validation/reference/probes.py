"""What PEFT's unmerged modules compute, asked of the modules themselves: no formula of any kind is known here.

A wrapped layer gets one-hot inputs: its answer to the i-th is the i-th column of the weight that it has in effect.
All in float64, one module at a time.
"""

import copy
import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

IMPULSES_A_CHANNEL = 8  # where every channel of a convolution is asked


@dataclass(frozen=True)
class Probe:
    """inputs: what one layer is asked; zeros: what it answers with its bias alone (None for embeddings)."""

    inputs: torch.Tensor
    zeros: torch.Tensor | None


def wrapped_modules(model: nn.Module) -> dict[str, Any]:
    """Path → the outermost PEFT wrapper there. Paths are those of the plain model."""
    wrappers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not is_below(name, wrappers):
            wrappers[name] = module
    return wrappers


def is_below(name: str, paths: Container[str]) -> bool:
    """Whether a module or parameter lies inside one of these modules."""
    return any(name[:at] in paths for at, letter in enumerate(name) if letter == ".")


def plain_parameters(model: nn.Module, wrapped: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters that no adapter kind computes: those outside all wrappers, and modules that were saved whole."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_below(name, wrapped):
            yield name, parameter
    for path, module in wrapped.items():
        saved = saved_whole(module)
        if saved is not None:
            for name, parameter in saved.named_parameters():
                yield f"{path}.{name}", parameter


def saved_whole(module: Any) -> nn.Module | None:
    """The trained copy of a layer that a wrapper puts in the layer's place (modules_to_save, LN tuning)."""
    copies: Any = None
    if isinstance(module, ModulesToSaveWrapper):
        copies = module.modules_to_save
    elif isinstance(module, LNTuningLayer):
        copies = module.ln_tuning_layers
    return copies[module.active_adapters[0]] if copies is not None else None


def plain_buffers(model: nn.Module, wrapped: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong to the stored model, a batch normalization's running variance for one: nothing trains
    them but modules that were saved whole."""
    for path, module in model.named_modules():
        if path not in wrapped and not is_below(path, wrapped):
            yield from _stored_buffers(path, module)
    for path, wrapper in wrapped.items():
        inside = saved_whole(wrapper) or base_layer(wrapper)
        for name, module in inside.named_modules(prefix=path):
            yield from _stored_buffers(name, module)


def _stored_buffers(path: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name, buffer


def base_layer(module: Any) -> Any:
    """The plain layer inside a wrapper."""
    layer = module
    while hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        layer = layer.base_layer if hasattr(layer, "base_layer") else layer.token_adapter
    return layer


def width_of(layer: Any) -> int:
    """Inputs of a linear layer or a Conv1D, which keeps outputs last."""
    return int(layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0])


def generator_of(seed: int, path: str) -> torch.Generator:
    """The random numbers of one module: by its name, so that they depend on no other module."""
    digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def make_probe(module: Any, count: int | None, generator: torch.Generator) -> Probe | None:
    """`count` one-hot inputs (None: all) for the layer inside a wrapper, or None for a layer of another type."""
    layer = base_layer(module)
    if isinstance(layer, nn.Linear | Conv1D):
        width = width_of(layer)
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
    exact_answers = exact(inputs)
    narrow = inputs.float() if inputs.is_floating_point() else inputs
    return exact_answers, float((module(narrow).double() - exact_answers).abs().max())


def random_signs(exact: Any, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` inputs of ±1 for the layer inside a wrapper, so that all elements of its weight take part."""
    layer = base_layer(exact)
    if isinstance(layer, nn.Linear | Conv1D):
        shape: tuple[int, ...] = (width_of(layer),)
    else:
        shape = (layer.in_channels, *_field(layer))
    signs = torch.randint(0, 2, (count, *shape), generator=generator)
    return signs.double() * 2 - 1


def is_attention(module: Any) -> bool:
    get = getattr(module, "get_base_layer", None)
    return get is not None and isinstance(get(), nn.MultiheadAttention)


@torch.no_grad()
def attention_in_effect(module: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Parameter of an nn.MultiheadAttention → (the base's values, those that PEFT's wrapper uses), float64.

    The wrapper's forward puts the weights in effect into torch's module, calls it, and takes them out again.
    """
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
