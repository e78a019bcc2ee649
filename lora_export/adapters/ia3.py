"""(IA)³ (arXiv:2205.05638, §3.3): a learned vector scales outputs, or the inputs of feed-forward layers."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import check_expression
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, Shapes, complete
from lora_export.contracts import TargetUpdate
from lora_export.patterns import fullmatch

if TYPE_CHECKING:
    import torch

NAME = "IA3"
FORMULA = "W·l: columns of feed-forward layers, rows (and the bias) of all others"

_VECTOR = "ia3_l"


@dataclass(frozen=True)
class RowScale:
    """weight · factors, a factor for each row; factors: fp32 (rows,). Also for biases."""

    factors: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return weight * self.factors[rows].reshape(-1, *(1 for _ in weight.shape[1:]))


@dataclass(frozen=True)
class ColumnScale:
    """weight · factors, a factor for each input channel; factors: fp32 (inputs of all groups,).

    outputs: rows of the whole weight. A convolution in groups sees other channels in each group of its rows.
    """

    factors: "torch.Tensor"
    outputs: int

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        inputs = weight.shape[1]
        groups = len(self.factors) // inputs
        owner = torch.arange(rows.start, rows.start + len(weight), device=weight.device) // (self.outputs // groups)
        factors = self.factors.reshape(groups, inputs)[owner]
        return weight * factors.reshape(len(weight), inputs, *(1 for _ in weight.shape[2:]))


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer's weight, and one for its bias, if it has one, where outputs are scaled."""
    file.refuse_weight(NAME)
    updates = []
    for module in complete(file, _VECTOR):
        shape = module.shape(_VECTOR)
        size = math.prod(shape)
        if len(shape) < 2 or size != max(shape):
            raise module.disagree("one dimension that is not 1")
        feedforward = _is_feedforward(file, module.name)
        updates.append(_weight(module, size, len(shape), feedforward))
        if not feedforward:
            updates.append(_bias(module, size))
    return updates


def _is_feedforward(file: AdapterFile, module: str) -> bool:
    """PEFT's rule: a regular expression that matches the whole name, or one of the endings in a list."""
    feedforward = file.config.get("feedforward_modules")
    if isinstance(feedforward, str):
        check_expression(feedforward, "feedforward_modules is", file.where)
        return fullmatch(feedforward, module) is not None
    if not isinstance(feedforward, list):
        raise file.refuse(
            f"feedforward_modules is {feedforward!r}",
            expected="a list of endings, or a regular expression: it decides whether inputs or outputs are scaled",
            next_step="save the adapter again: model.save_pretrained(DIR)",
        )
    return module.endswith(tuple(map(str, feedforward)))


def _weight(module: AdaptedModule, size: int, dimensions: int, feedforward: bool) -> TargetUpdate:
    by_rows = not feedforward
    if dimensions == 2 and module.is_conv1d:
        by_rows = feedforward
    rest = (None,) * (dimensions - 2)

    def load(shape: tuple[int, ...]) -> RowScale | ColumnScale:
        factors = module.read(_VECTOR).reshape(-1)
        if by_rows:
            return RowScale(factors)
        if not shape[1] or size % shape[1] or (dimensions == 2 and size != shape[1]):
            raise module.file.refuse(
                f"the vector has {size} values, the weight {shape[1]} inputs",
                tensor=module.keys[_VECTOR],
                expected="one value for each input",
            )
        groups = size // shape[1]
        if shape[0] % groups:
            raise module.file.refuse(
                f"the vector has {size} values, so {groups} groups of {shape[1]} inputs for {shape[0]} outputs",
                tensor=module.keys[_VECTOR],
                expected="as many outputs in each group",
            )
        return ColumnScale(factors, shape[0])

    shapes: Shapes = ((size, None, *rest),) if by_rows else ((None, size, *rest),)
    if not by_rows and rest:
        shapes = ((None, None, *rest),)  # in groups, the weight has fewer inputs than the layer
    return TargetUpdate(module.weight, "ia3", module.used, shapes, load)


def _bias(module: AdaptedModule, size: int) -> TargetUpdate:
    def load(shape: tuple[int, ...]) -> RowScale:
        return RowScale(module.read(_VECTOR).reshape(-1))

    return TargetUpdate(module.bias, "ia3", (), ((size,),), load, optional=True)
