"""PEANuT (arXiv:2410.01870, eq. 5): W' = W + s·f(Wᵀ)ᵀ, a small network of the weight itself, not of the input.

f is A, then `depth` encoders and as many decoders, each of these followed by the activation, with the input of each
encoder added behind its decoder, and B. A column of W is an input of f, so all rows are needed.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.adapters.config import number, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.parts import Layered, layered
from lora_export.contracts import TargetUpdate
from lora_export.storage.documents import is_kind

if TYPE_CHECKING:
    import torch

NAME = "PEANuT"
PEFT_TYPES = ("PEANUT",)
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
class NetworkUpdate:
    """weight + scaling · f(weightᵀ)ᵀ; first (r, out), last (out, r), encoders and decoders (r, r).

    All rows together, in float64 whatever comes in.
    """

    first: "torch.Tensor"
    last: "torch.Tensor"
    encoders: tuple["torch.Tensor", ...]
    decoders: tuple["torch.Tensor", ...]
    scaling: float
    activation: str

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        exact, act = weight.double(), _activation(self.activation)
        x = act(exact.T @ self.first.double().T)
        residuals = []
        for encoder in self.encoders:
            residuals.append(x)
            x = act(x @ encoder.double().T)
        for decoder in self.decoders:
            x = act(x @ decoder.double().T) + residuals.pop()
        changed: torch.Tensor = exact + self.scaling * (self.last.double() @ x.T)
        return changed.to(weight.dtype)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: between them all is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer. AdapterError for an activation that is no function of a number alone."""
    deepest = max((int(m[1]) for key in file.tensors if (m := _LAYER.search(key))), default=-1) + 1
    inner = [f"peanut_{side}.{i}" for side in ("encoders", "decoders") for i in range(deepest)]
    found = layered(file, ("peanut_A", "peanut_B", *inner))
    if not found:
        return []
    file.refuse_weight(NAME)
    activation, depth = file.config.get("act_fn"), file.config.get("depth")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise file.refuse(f"act_fn is {activation!r}", expected=f"one of {', '.join(sorted(ACTIVATIONS))}")
    if not is_kind(depth, int) or depth != deepest:
        raise file.refuse(
            f"depth is {depth!r}, the file has {deepest} encoders in a layer",
            expected="a depth that describes the file",
        )
    rank, scaling = whole(file.config, "r", file.where), number(file.config, "scaling", file.where)
    return [_update(layer, inner, rank, scaling) for layer in found]


def _update(layer: Layered, inner: list[str], rank: int, scaling: float) -> TargetUpdate:
    layer.need("peanut_A", "peanut_B", *inner)
    a, b = layer.shape("peanut_A"), layer.shape("peanut_B")
    if len(a) != 2 or a[0] != rank or b != a[::-1] or any(layer.shape(m) != (rank, rank) for m in inner):
        raise layer.disagree(
            "peanut_A",
            "peanut_B",
            *inner,
            expected=f"A ({rank}, out), B (out, {rank}), and ({rank}, {rank}) between",
        )

    def load(_: tuple[int, ...]) -> NetworkUpdate:
        half = len(inner) // 2
        middle = tuple(layer.read(m) for m in inner)
        return NetworkUpdate(
            layer.read("peanut_A"),
            layer.read("peanut_B"),
            middle[:half],
            middle[half:],
            scaling,
            str(layer.file.config["act_fn"]),
        )

    return TargetUpdate(
        f"{layer.name}.weight",
        "peanut",
        layer.used,
        ((b[0], None),),
        load,
        row_wise=lambda _: False,
        copies=_COPIES,
    )
