"""What adapters do to the activations of a layer: never to its weight, so that no formula is the merge's own.

A `Change` gets the input of a layer and the layer as it was before it. Outputs lie on the last axis, those of a
convolution on the second.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

Layer = Callable[[torch.Tensor], torch.Tensor]
CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


def axis_of(layer: nn.Module) -> int:
    """The axis of a layer's outputs."""
    return 1 if isinstance(layer, CONVOLUTIONS | nn.GroupNorm) else -1


class Adapted(nn.Module):
    """A layer of the base, and what adapters change of what it computes.

    base_layer: the base's; changes: in the order of the adapters; errors: rounding errors of a weight, of which the
    layer's outputs for this input are added. Without `active` it is the base's layer.
    """

    base_layer: Any
    changes: Any

    def __init__(self, base_layer: nn.Module, changes: Sequence["Change"] = ()) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.changes = nn.ModuleList(changes)
        self.active = True
        self.errors: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        """Models look at a weight's type, and pipelines at the width of a layer: at the base's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        layer: Layer = partial(self._plain, more)
        if not self.active:
            return layer(x)
        for change in self.changes:
            layer = change.after(layer)
        y: torch.Tensor = layer(x)
        if self.errors:
            none = {n: torch.zeros_like(p) for n, p in self.base_layer.named_parameters() if n not in self.errors}
            y = y + functional_call(self.base_layer, {**none, **self.errors}, (x, *more))
        return y

    def _plain(self, more: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x, *more)
        return y


class Change(nn.Module):
    """axis: of the layer's outputs."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def after(self, inner: Layer) -> Layer:
        return lambda x: self.forward(x, inner)

    def forward(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        raise NotImplementedError

    def constant(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        """The answer to nothing, which is the layer's bias."""
        first = x[:1] if self.axis == 1 else x.reshape(-1, x.shape[-1])[:1]
        zero = inner(torch.zeros_like(first))
        return zero if self.axis == 1 else zero.reshape(-1)

    def along(self, values: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A value for each output, such that it can be multiplied with `y`."""
        return values.to(y.dtype).reshape(-1, *[1] * (y.dim() - 2)) if self.axis == 1 else values.to(y.dtype)


class Through(Change):
    """A layer of PEFT around the base's, whose own work this is. weight: of what it adds to the base's outputs."""

    def __init__(self, axis: int, layer: nn.Module, weight: float) -> None:
        super().__init__(axis)
        self.layer, self.weight = layer, weight

    def forward(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        if self.weight == 1.0:
            return y
        before = inner(x)
        return before + self.weight * (y - before)


class Added(Change):
    """delta: what the trained weight's update makes of the input; rows, swap: of a Piece; factor: of the whole."""

    def __init__(self, axis: int, delta: nn.Module, factor: float, rows: slice | None, swap: bool) -> None:
        super().__init__(axis)
        self.delta, self.factor, self.rows, self.swap = delta, factor, rows, swap

    def forward(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        return inner(x) + self.factor * cut(self.delta(x), self.rows, self.swap, self.axis)


class Shifted(Change):
    """values: added to the bias."""

    values: torch.Tensor

    def __init__(self, axis: int, values: torch.Tensor) -> None:
        super().__init__(axis)
        self.register_buffer("values", values)

    def forward(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        y = inner(x)
        return y + self.along(self.values, y)


class Replaced(Change):
    """parameters: that the layer has instead of its own."""

    def __init__(self, axis: int, layer: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__(axis)
        self.instead = Instead(layer, parameters, zero=False)

    def forward(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        answer: torch.Tensor = self.instead(x)
        return answer


class Scaled(Change):
    """IA³, and DoRA after its update: outputs, or inputs, are multiplied.

    factors: of each, (outputs) or (inputs).
    """

    factors: torch.Tensor

    def __init__(self, axis: int, factors: torch.Tensor, on_input: bool) -> None:
        super().__init__(axis)
        self.register_buffer("factors", factors)
        self.on_input = on_input

    def forward(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        if self.on_input:
            return inner(x * self.along(self.factors, x))
        bias = self.constant(x, inner)
        y = inner(x) - bias
        return y * self.along(self.factors, y) + bias


class Mixed(Change):
    """GLoRA: the inputs are mixed before the layer, and a low-rank update is added after it.

    second, first: (in, r) and (r, in) of what is added to the input; added: the low-rank update.
    """

    second: torch.Tensor
    first: torch.Tensor

    def __init__(self, added: Added, first: torch.Tensor, second: torch.Tensor) -> None:
        super().__init__(added.axis)
        self.added = added
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    def forward(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        channels = x.movedim(self.axis, -1)
        more = F.linear(F.linear(channels, self.first.to(x.dtype)), self.second.to(x.dtype)).movedim(-1, self.axis)
        part = self.added
        return inner(x + part.factor * more) + part.factor * cut(part.delta(x), part.rows, part.swap, part.axis)


class Rotated(Change):
    """OFT and BOFT: the outputs are turned, in groups.

    turns: (stages, groups, size, size), each stage applied as y[m] = Σ_n turn[m, n] · y[n]; orders: (stages,
    outputs), which outputs stand beside each other in a stage; rescale: (outputs), or nothing.
    """

    turns: torch.Tensor
    orders: torch.Tensor
    rescale: torch.Tensor | None

    def __init__(self, axis: int, turns: torch.Tensor, orders: torch.Tensor, rescale: torch.Tensor | None) -> None:
        super().__init__(axis)
        self.register_buffer("turns", turns)
        self.register_buffer("orders", orders)
        self.register_buffer("rescale", rescale)

    def forward(self, x: torch.Tensor, inner: Layer) -> torch.Tensor:
        bias = self.constant(x, inner)
        y = (inner(x) - bias).movedim(self.axis, -1)
        for turn, order in zip(self.turns.to(x.dtype), self.orders, strict=True):
            groups = y[..., order].reshape(*y.shape[:-1], *turn.shape[:2])
            y = torch.einsum("gmn,...gn->...gm", turn, groups).flatten(-2)[..., torch.argsort(order)]
        if self.rescale is not None:
            y = y * self.rescale.to(y.dtype)
        return y.movedim(-1, self.axis) + bias


def cut(y: torch.Tensor, rows: slice | None, swap: bool, axis: int) -> torch.Tensor:
    """The outputs that belong to a piece of the trained weight; with the halves in the base's order."""
    if rows is not None:
        y = y.narrow(axis, rows.start, rows.stop - rows.start)
    return torch.cat(y.chunk(2, axis)[::-1], axis) if swap else y


class Instead(nn.Module):
    """A layer with other parameters than its own. zero: those that are not given are zeros, not the layer's own."""

    def __init__(self, layer: nn.Module, parameters: dict[str, torch.Tensor], zero: bool) -> None:
        super().__init__()
        self._layer = [layer]  # its parameters are counted where the layer is
        self._names = tuple(parameters)
        self._zero = zero
        for name, value in parameters.items():
            self.register_buffer(f"_{name}", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self._layer
        given = {n: getattr(self, f"_{n}").to(next(layer.parameters()).dtype) for n in self._names}
        if self._zero:
            given = {**{n: torch.zeros_like(p) for n, p in layer.named_parameters()}, **given}
        answer: torch.Tensor = functional_call(layer, given, (x,))
        return answer


class Tucker(nn.Module):
    """A convolution between two of one pixel. down: (r, in), up: (out, r); middle: of (r, r, k…)."""

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, down: torch.Tensor, middle: nn.Module, up: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.middle(torch.einsum("ri,bi...->br...", self.down, x))
        return torch.einsum("or,br...->bo...", self.up, y)


class Looked(nn.Module):
    """A low-rank update of an embedding. rows: (tokens, r), width: (r, dimensions)."""

    rows: torch.Tensor
    width: torch.Tensor

    def __init__(self, rows: torch.Tensor, width: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("width", width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.rows) @ self.width
