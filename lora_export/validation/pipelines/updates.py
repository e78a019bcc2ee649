"""What an update makes of a layer's input: PEFT's own layers, filled from the file, around a layer of zeros."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import peft.tuners.loha.layer as loha
import peft.tuners.lokr.layer as lokr
import peft.tuners.lora.layer as lora
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from torch import nn

from lora_export.errors import InputError
from lora_export.validation.pipelines.activations import CONVOLUTIONS, Looked, Tucker

NAME = "file"  # of PEFT's adapter
Parts = Mapping[str, torch.Tensor]
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def update_of(parts: Parts, layer: nn.Module) -> tuple[nn.Module, int | None]:
    """(what a low-rank, Hadamard or Kronecker update adds to the outputs, its rank).

    parts: of one trained module; layer: of the base, or one of those that the trained weight was split into. The
    rank is that which alpha is divided by, None where alpha says nothing.
    """
    if "lora_down" in parts:
        return _low_rank(parts["lora_down"], parts["lora_up"], layer, parts), parts["lora_down"].shape[0]
    if "hada_w1_b" in parts:
        return _hadamard(parts, layer), parts["hada_w1_b"].shape[0]
    return _kronecker(parts, layer)


def low_rank(down: torch.Tensor, up: torch.Tensor, layer: nn.Module) -> nn.Module:
    return _low_rank(down, up, layer, {})


def has_update(parts: Parts) -> bool:
    return bool({"lora_down", "hada_w1_a", "lokr_w1", "lokr_w1_a"} & parts.keys())


def _low_rank(down: torch.Tensor, up: torch.Tensor, layer: nn.Module, parts: Parts) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        if up.shape[0] == layer.num_embeddings:
            return Looked(up.flatten(1), down.flatten(1))
        return Looked(down.flatten(1).T, up.flatten(1).T)
    if "lora_mid" in parts:
        return Tucker(down.flatten(1), _convolution(layer, parts["lora_mid"]), up.flatten(1))
    plain, bias = _plain_of(layer), parts.get("lora_up_bias")
    classes = dict(zip(_PLAIN, (lora.Linear, lora.Conv1d, lora.Conv2d, lora.Conv3d), strict=True))
    config = LoraConfig(r=len(down), lora_alpha=len(down), lora_bias=bias is not None, init_lora_weights=False)
    made = classes[plain](_zeros(layer, up.shape[0]), NAME, config=config, r=len(down), lora_alpha=len(down))
    _fill(made.lora_A[NAME], down)
    _fill(made.lora_B[NAME], up)
    if bias is not None:
        made.lora_B[NAME].bias.data = bias
    return _alone(made)


def _hadamard(parts: Parts, layer: nn.Module) -> nn.Module:
    tucker = "hada_t1" in parts
    outputs = parts["hada_w1_a"].shape[1 if tucker else 0]
    classes = {nn.Linear: loha.Linear, nn.Conv1d: loha.Conv1d, nn.Conv2d: loha.Conv2d}
    made = _peft(classes, LoHaConfig, layer, outputs)
    for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"):
        _set(getattr(made, name), parts.get(name))
    return _alone(made)


def _kronecker(parts: Parts, layer: nn.Module) -> tuple[nn.Module, int | None]:
    tall = next(parts[n] for n in ("lokr_w1", "lokr_w1_a") if n in parts).shape[0]
    if "lokr_t2" in parts:
        outputs = tall * parts["lokr_w2_a"].shape[1]
    else:
        outputs = tall * next(parts[n] for n in ("lokr_w2", "lokr_w2_a") if n in parts).shape[0]
    classes = {nn.Linear: lokr.Linear, nn.Conv1d: lokr.Conv1d, nn.Conv2d: lokr.Conv2d}
    made = _peft(classes, LoKrConfig, layer, outputs)
    for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"):
        _set(getattr(made, name), parts.get(name))
    rank = next((parts[n].shape[0] for n in ("lokr_w2_b", "lokr_w1_b") if n in parts), None)
    return _alone(made), rank


def _peft(classes: Mapping[Any, Any], config: Any, layer: nn.Module, outputs: int) -> Any:
    plain = _plain_of(layer)
    if plain not in classes:
        raise InputError(
            f"PEFT has no {config.__name__.removesuffix('Config')} for a {type(layer).__name__}, so nothing can "
            "tell what the adapter makes of it",
            expected=", ".join(c.__name__ for c in classes),
        )
    return classes[plain](_zeros(layer, outputs), NAME, config=config(r=1, alpha=1), r=1, alpha=1.0)


def _alone(made: Any) -> nn.Module:
    """A layer of PEFT that answers with what it adds to the zeros of its base."""
    made.scaling[NAME] = 1.0
    made.base_layer.forward = lambda x, *_: x.new_zeros(())
    module: nn.Module = made.requires_grad_(False).eval()
    return module


def _zeros(layer: Any, outputs: int) -> Any:
    """A layer of this geometry with so many outputs, whose weight takes no memory."""
    plain: Callable[..., Any] = _plain_of(layer)
    if plain is nn.Linear:
        made, shape = plain(layer.in_features, outputs, device="meta"), (outputs, layer.in_features)
    else:
        made = plain(layer.in_channels, outputs, **_geometry(layer), device="meta")
        shape = (outputs, *layer.weight.shape[1:])
    made.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    made.bias = nn.Parameter(torch.zeros(()).expand(outputs), requires_grad=False)
    return made


def _convolution(layer: Any, weight: torch.Tensor) -> nn.Module:
    """A convolution of the geometry of `layer` with another weight, (out, in, k…)."""
    made: Any = _plain_of(layer)(weight.shape[1], weight.shape[0], **_geometry(layer), bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    module: nn.Module = made
    return module


def _geometry(layer: Any) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def _plain_of(layer: nn.Module) -> Any:
    plain = next((c for c in _PLAIN if isinstance(layer, c)), None)
    if plain is None:
        raise InputError(
            f"an update of a {type(layer).__name__}",
            expected="a linear layer, a convolution or an embedding",
        )
    return plain


def _fill(layer: Any, value: torch.Tensor) -> None:
    """A matrix stands for a filter of one pixel, and the other way round."""
    layer.weight.data = value.reshape(layer.weight.shape)


def _set(held: Any, value: torch.Tensor | None) -> None:
    if NAME in held:
        del held[NAME]
    if value is not None:
        held[NAME] = nn.Parameter(value, requires_grad=False)


def taps_of(layer: Any) -> int:
    """Elements of a filter of one channel."""
    return math.prod(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 1
