"""PEFT's unmerged model against a merged one, module by module and parameter by parameter."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

TOLERANCE = 1e-5


@torch.no_grad()
def differing(unmerged: Any, merged: Any) -> list[str]:
    """What the merged model does not do as the unmerged one, in words; both of one floating-point type."""
    return list(_walk("", unmerged, merged))


def _walk(name: str, unmerged: Any, merged: Any) -> Iterator[str]:
    if isinstance(unmerged, ParamWrapper):
        yield from _parameters(name, unmerged, merged)
    elif isinstance(unmerged, BaseTunerLayer | AuxiliaryTrainingWrapper):
        yield from _wrapped(name, unmerged, merged)
    else:
        yield from _own(name, unmerged, merged)
        children = dict(merged.named_children())
        for child, module in unmerged.named_children():
            if child not in children:
                yield f"{name}.{child} is not there"
            else:
                yield from _walk(f"{name}.{child}".lstrip("."), module, children[child])


def _own(name: str, unmerged: nn.Module, merged: nn.Module) -> Iterator[str]:
    """Parameters and buffers of the module itself."""
    theirs = dict(unmerged.named_parameters(recurse=False)) | dict(unmerged.named_buffers(recurse=False))
    ours = dict(merged.named_parameters(recurse=False)) | dict(merged.named_buffers(recurse=False))
    for key, value in theirs.items():
        found = ours.get(key)
        if found is None or found.shape != value.shape or not torch.equal(found, value):
            yield f"{name}.{key} is not the base's"


def _wrapped(name: str, unmerged: Any, merged: nn.Module) -> Iterator[str]:
    """The same inputs through both."""
    weight = merged.weight if hasattr(merged, "weight") else next(merged.parameters())
    inputs: tuple[torch.Tensor, ...]
    if isinstance(merged, nn.Embedding):
        inputs = (torch.arange(merged.num_embeddings),)
    elif isinstance(merged, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        inputs = (torch.randn(2, merged.in_channels, *(k + 2 for k in merged.kernel_size), dtype=weight.dtype),)
    elif isinstance(merged, nn.Linear):
        inputs = (torch.randn(3, merged.in_features, dtype=weight.dtype),)
    elif hasattr(merged, "nf"):  # Conv1D
        inputs = (torch.randn(3, weight.shape[0], dtype=weight.dtype),)
    else:
        saved = unmerged.modules_to_save["default"]
        yield from _walk(name, saved, merged)
        return
    expected, found = unmerged(*inputs), merged(*inputs)
    if expected.shape != found.shape:
        yield f"{name} gives {list(found.shape)}, unmerged {list(expected.shape)}"
    elif not float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
        yield f"{name} is off by {float((found - expected).abs().max() / expected.abs().max()):.1e}"


def _parameters(name: str, unmerged: Any, merged: nn.Module) -> Iterator[str]:
    """Parameters under LoRA: the base's and what PEFT's forward adds to it."""
    deltas: dict[str, torch.Tensor] = {}
    layer = unmerged
    while isinstance(layer, ParamWrapper):
        deltas[layer.parameter_name] = layer.get_delta_weight("default")
        layer = layer.base_layer
    for key, value in layer.named_parameters():
        expected = value + deltas.get(key, torch.zeros(()))
        found = merged.get_parameter(key)
        if found.shape != expected.shape or not float((found - expected).abs().max()) <= TOLERANCE * float(
            expected.abs().max()
        ):
            yield f"{name}.{key} is not what PEFT's forward uses"
