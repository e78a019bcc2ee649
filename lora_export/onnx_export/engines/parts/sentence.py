"""`sentence_embedding`: what sentence-transformers' modules make of the states, in the graph.

The formulas are those of the modules' documentation (sbert.net, "Modules"): pooling over the tokens that the mask
has, then dense layers, norms and a division by the length of the vector. They are written so that fp16 holds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export.onnx_export.engines.model_without_weights import ModelWithoutWeights
from lora_export.onnx_export.engines.parts.graph_part import GraphPart
from lora_export.sentence_modules import POOLING, SentenceModule, modules_of, pools, weight_files

STATES, MASK, OUTPUT = "last_hidden_state", "attention_mask", "sentence_embedding"
_TINY = 1e-7  # the smallest divisor that fp16 holds
_HEAD = "_sentence_modules"


def attach(model: ModelWithoutWeights, folder: Path) -> ModelWithoutWeights:
    """The model with the modules behind its transformer as submodules, named as in modules.json.

    Their weights count as tensors of the checkpoint.
    """
    from safetensors.torch import load_file

    modules, files = modules_of(folder), weight_files(folder)
    if not pools(modules):
        return model
    head, names = [], dict(model.tensors)
    for module in modules:
        state = load_file(files[module.path]) if module.path in files else {}
        layer = _layer(module, state)
        if layer is None:
            continue
        if state:
            layer.load_state_dict({name: value.float() for name, value in state.items()})
            names |= {module.weight(name): module.weight(name) for name in state}
            model.model.add_module(module.path, layer.eval().requires_grad_(False))
        head.append(layer)
    object.__setattr__(model.model, _HEAD, tuple(head))
    return replace(model, tensors=names)


def pooled(part: GraphPart, model: Any) -> GraphPart:
    """The part with `sentence_embedding` as one more output, where modules were attached to the model."""
    head: Sequence[nn.Module] = getattr(model, _HEAD, ())
    if not head or STATES not in part.outputs or MASK not in part.inputs:
        return part
    mask, states = list(part.inputs).index(MASK), list(part.outputs).index(STATES)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = part.run(*values)
        embedding = head[0](outputs[states], values[mask])
        for layer in head[1:]:
            embedding = layer(embedding)
        return (*outputs, embedding)

    return replace(part, run=run, outputs={**part.outputs, OUTPUT: {0: "batch_size"}})


def _layer(module: SentenceModule, state: Mapping[str, torch.Tensor]) -> nn.Module | None:
    """The module in torch, without its weights; None for one that computes nothing here."""
    if not module.path or module.kind in ("Transformer", "Dropout"):
        return None
    if module.kind == POOLING:
        return Pooling(module.modes)
    if module.kind == "Dense":
        return _Dense(state, module.settings)
    if module.kind == "LayerNorm":
        return _Norm(len(state["norm.weight"]))
    assert module.kind == "Normalize"  # `embedders.as_exported` refuses others
    return _Normalize()


class Pooling(nn.Module):
    """States (rows, length, width) and a mask (rows, length) → (rows, modes × width)."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self._modes = modes

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([_POOLED[mode](states, mask) for mode in self._modes], dim=-1)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """1, 2, … where the mask is 1, else 0."""
    return mask * torch.arange(1, mask.shape[1] + 1, dtype=mask.dtype)[None]


def _one(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The state of each row at its place."""
    return states.gather(1, at[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    length = mask.shape[1]
    return _one(states, length - (mask * torch.arange(length, 0, -1, dtype=mask.dtype)[None]).amax(1))


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _one(states, (_positions(mask).amax(1) - 1).clamp(min=0))


def _largest(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask[..., None] == 0, torch.finfo(torch.float32).min).amax(1)


def _weighted(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """weights: (rows, length), of a sum of 1."""
    return torch.matmul(weights[:, None, :], states).squeeze(1)


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return _weighted(states, mask.to(states.dtype) / count.to(states.dtype))


def _mean_by_root(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return _weighted(states, mask.to(states.dtype) / count.to(states.dtype).sqrt())


def _weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # A sum of positions does not fit into fp16; one of shares of the length does.
    shares = _positions(mask).to(states.dtype) / mask.shape[1]
    return _weighted(states, shares / shares.sum(1, keepdim=True).clamp(min=_TINY))


_POOLED = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


class _Dense(nn.Module):
    def __init__(self, state: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
        super().__init__()
        outputs, inputs = state["linear.weight"].shape
        self.linear = nn.Linear(inputs, outputs, "linear.bias" in state)
        self.activation = getattr(nn, str(settings.get("activation_function", "Tanh")).rpartition(".")[2])()

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.activation(self.linear(embedding))  # type: ignore[no-any-return]


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.norm(embedding)  # type: ignore[no-any-return]


class _Normalize(nn.Module):
    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        # By its largest number first: in fp16 the squares of a long vector have no sum.
        scaled = embedding / embedding.abs().amax(-1, keepdim=True).clamp(min=_TINY)
        return scaled / scaled.square().sum(-1, keepdim=True).sqrt().clamp(min=_TINY)
