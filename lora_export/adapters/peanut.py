"""PEANuT (arXiv:2410.01870, eq. 5): W' = W + s·f(Wᵀ)ᵀ, a small network of the weight itself, not of the input.

f is A, then `depth` encoders and as many decoders, each of these followed by the activation, with the input of each
encoder added behind its decoder, and B. A column of W is an input of f, so all rows are needed.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.adapters.config import Count, Number, Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.updates import ExactUpdate, WholeTarget
from lora_export.contracts import TargetUpdate

NAME = "PEANuT"
FORMULA = "W + s·f(Wᵀ)ᵀ, f a network with the activation act_fn"

# Activations of transformers that are functions of a number alone. Others have parameters or are random.
ACTIVATIONS = frozenset(
    {"relu", "relu2", "relu6", "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh",
     "gelu_accurate", "gelu_python_tanh", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "sigmoid",
     "silu", "swish", "tanh"}
)  # fmt: skip
_COPIES = 14  # in fp32: the weight, its change and the result, in float64
_LAYER = re.compile(r"\.peanut_(?:encoders|decoders)\.(\d{1,4})(?:\.weight)?$")


@dataclass(frozen=True)
class NetworkUpdate(ExactUpdate):
    """weight + scaling · f(weightᵀ)ᵀ; first (r, out), last (out, r), encoders and decoders (r, r)."""

    first: torch.Tensor
    last: torch.Tensor
    encoders: tuple[torch.Tensor, ...]
    decoders: tuple[torch.Tensor, ...]
    scaling: float
    activation: str

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        act = _activation(self.activation)
        x = act(weight.T @ self.first.double().T)
        residuals = []
        for encoder in self.encoders:
            residuals.append(x)
            x = act(x @ encoder.double().T)
        for decoder in self.decoders:
            x = act(x @ decoder.double().T) + residuals.pop()
        changed: torch.Tensor = weight + self.scaling * (self.last.double() @ x.T)
        return changed


@dataclass(frozen=True)
class Settings:
    """depth: encoders in each layer, and decoders."""

    r: Positive
    scaling: Number
    act_fn: str
    depth: Count


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. AdapterError for an activation that is no function of a number alone."""
    deepest = max((int(m[1]) for key in file.tensors if (m := _LAYER.search(key))), default=-1) + 1
    inner = [f"peanut_{side}.{i}" for side in ("encoders", "decoders") for i in range(deepest)]
    file.refuse_weight(NAME)
    settings = file.settings(Settings)
    if settings.act_fn not in ACTIVATIONS:
        expected = f"one of {', '.join(sorted(ACTIVATIONS))}"
        raise file.refuse(f"act_fn is {settings.act_fn!r}", expected=expected)
    if settings.depth != deepest:
        raise file.refuse(
            f"depth is {settings.depth}, the file has {deepest} encoders in a layer",
            expected="a depth that describes the file",
        )
    return [_update(module, inner, settings) for module in modules(file, "peanut_A", "peanut_B", *inner)]


def _update(module: AdaptedModule, inner: list[str], settings: Settings) -> TargetUpdate:
    module.need("peanut_A", "peanut_B", *inner)
    rank, a, b = settings.r, module.shape("peanut_A"), module.shape("peanut_B")
    if len(a) != 2 or a[0] != rank or b != a[::-1] or any(module.shape(m) != (rank, rank) for m in inner):
        raise module.disagree(f"A ({rank}, out), B (out, {rank}), and ({rank}, {rank}) between")

    def load(_: tuple[int, ...]) -> NetworkUpdate:
        first, last, *middle = (module.read(m) for m in module.keys)
        encoders, decoders = tuple(middle[: settings.depth]), tuple(middle[settings.depth :])
        return NetworkUpdate(first, last, encoders, decoders, settings.scaling, settings.act_fn)

    return WholeTarget(module.weight, "peanut", module.used, ((b[0], None),), load, copies=_COPIES)
