"""The embedding that sentence-transformers' modules make of a model's states: row by row, of real tokens alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lora_export.sentence_modules import SentenceModule, modules_of, pools, weight_files, without_weights
from lora_export.validation.comparing.tested_model import plain

OUTPUT = "sentence_embedding"
_HEAD = "_sentence_modules"


@dataclass(frozen=True)
class Head:
    """modules: behind the transformer, in order; layers: the one with weights of each path."""

    modules: tuple[SentenceModule, ...]
    layers: Mapping[str, nn.Module]


def attach(model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.dtype]:
    """Put the modules of a folder behind a model, as submodules in fp32; nothing for a folder without pooling.

    weights: values by their names in the model, which take the place of the folder's. Returns the stored types.
    """
    modules, body = modules_of(folder), plain(model)
    if not pools(modules) or without_weights(folder):
        return {}
    layers, types = dict[str, nn.Module](), dict[str, torch.dtype]()
    files = weight_files(folder)
    for module in (m for m in modules if m.path in files):
        stored = load_file(files[module.path])
        types |= {module.weight(name): value.dtype for name, value in stored.items()}
        (kind,) = {name.partition(".")[0] for name in stored}  # "linear" or "norm"
        values = {n.partition(".")[2]: (weights or {}).get(module.weight(n), v).float() for n, v in stored.items()}
        layers[module.path] = _layer(module, values)
        body.add_module(module.path, nn.ModuleDict({kind: layers[module.path]}))
    object.__setattr__(body, _HEAD, Head(modules, layers))
    return types


def _layer(module: SentenceModule, values: Mapping[str, torch.Tensor]) -> nn.Module:
    weight = values["weight"]
    if module.kind == "LayerNorm":
        layer: nn.Module = nn.LayerNorm(len(weight))
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], "bias" in values)
    layer.load_state_dict(values)
    return layer.eval().requires_grad_(False)


def embedding(model: Any, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """(rows, width) in the type of the states (rows, length, …); None where no modules were attached."""
    head = head_of(model)
    if head is None:
        return None
    kept = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return torch.stack([_row(head, s[at], at.nonzero()[:, 0]) for s, at in zip(states, kept, strict=True)])


def head_of(model: Any) -> Head | None:
    """What `attach` put behind a model."""
    head: Head | None = getattr(plain(model), _HEAD, None)
    return head


def _row(head: Head, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """tokens: (count, width) without padding; places: where they stood in the batch."""
    value = tokens
    for module in head.modules:
        if module.kind == "Pooling":
            value = torch.cat([_POOLED[mode](tokens, places) for mode in module.modes])
        elif module.kind == "Normalize":
            value = value / torch.linalg.vector_norm(value)
        elif module.path in head.layers:
            value = head.layers[module.path](value)
            value = _activation(module)(value) if module.kind == "Dense" else value
    return value


def _activation(module: SentenceModule) -> nn.Module:
    named = str(module.settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation: nn.Module = getattr(nn, named.rpartition(".")[2])()
    return activation


_Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_POOLED: Mapping[str, _Pool] = {
    "cls": lambda tokens, _: tokens[0],
    "max": lambda tokens, _: tokens.max(0).values,
    "mean": lambda tokens, _: tokens.mean(0),
    "mean_sqrt_len_tokens": lambda tokens, _: tokens.mean(0) * len(tokens) ** 0.5,
    "weightedmean": lambda tokens, places: _shares(places + 1).to(tokens.dtype) @ tokens,
    "lasttoken": lambda tokens, _: tokens[-1],
}


def _shares(counts: torch.Tensor) -> torch.Tensor:
    return counts / counts.sum()
