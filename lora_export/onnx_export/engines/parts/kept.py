"""What a decoder keeps from one step to the next, as inputs and outputs of a graph: keys, values, and states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.onnx_export.engines.dynamo_passes.recurrent import remember_state
from lora_export.onnx_export.engines.parts.graph_part import BATCH, Axes, Input

_SHORT = 3  # tokens of the run that shows what a model keeps


@dataclass(frozen=True)
class Kept:
    """A tensor that a model keeps from one step to the next.

    layer: of the cache; slot: `keys`, `values`, `conv_states` or `recurrent_states`; index: which of several
    states; name: as transformers.js and Optimum have it, behind `past_` or `past_key_values.`; shape: without the
    batch, and without the length where it `grows`.
    """

    layer: int
    slot: str
    index: int
    name: str
    shape: tuple[int, ...]

    @property
    def grows(self) -> bool:
        return self.slot in ("keys", "values")

    @property
    def past(self) -> str:
        return f"past_key_values.{self.name}" if self.grows else f"past_{self.name}"

    @property
    def present(self) -> str:
        return f"present.{self.name}" if self.grows else f"present_{self.name}"

    def past_input(self, length: int, axis: str) -> Input:
        if not self.grows:
            return (BATCH, *self.shape), torch.float32, {0: "batch_size"}
        heads, size = self.shape
        return (BATCH, heads, length, size), torch.float32, {0: "batch_size", 2: axis}

    def axes(self, axis: str) -> Axes:
        return {0: "batch_size", 2: axis} if self.grows else {0: "batch_size"}


def kept_by(model: Any, run: Callable[[torch.Tensor, Any], Any]) -> tuple[Kept, ...]:
    """What the model keeps, asked of itself: `run` gives it a few tokens and an empty cache, without values."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    run(torch.ones((BATCH, _SHORT), dtype=torch.int64), cache)
    recurrent = "ssm" if any("mamba" in type(m).__name__.lower() for m in model.modules()) else "recurrent"
    found = []
    for i, layer in enumerate(cache.layers):
        for slot, what in (("conv_states", "conv"), ("recurrent_states", recurrent)):
            states = getattr(layer, slot, None) or {}
            for j, state in states.items():
                if state is not None:
                    number = f"{i}.{j}" if len(states) > 1 else str(i)
                    found.append(Kept(i, slot, j, f"{what}.{number}", tuple(state.shape[1:])))
        for slot, what in (("keys", "key"), ("values", "value")):
            state = getattr(layer, slot, None)
            if state is not None and state.dim() == 4:
                _, heads, _, size = state.shape
                found.append(Kept(i, slot, 0, f"{i}.{what}", (heads, size)))
    return tuple(found)


def holding(kept: Sequence[Kept], values: Sequence[torch.Tensor], config: Any) -> Any:
    """A cache that holds these values.

    Layers with a sliding window keep everything: the mask does the window.
    """
    from transformers import DynamicCache

    class Remembering(DynamicCache):  # type: ignore[misc]
        def get_recurrent_state(self, *place: Any, **named: Any) -> torch.Tensor | None:
            return remember_state(super().get_recurrent_state(*place, **named))

    cache = Remembering(config=config)
    by_layer: dict[int, list[tuple[Kept, torch.Tensor]]] = {}
    for each, value in zip(kept, values, strict=True):
        by_layer.setdefault(each.layer, []).append((each, value))
    for i, held in by_layer.items():
        layer = _layer({each.slot for each, _ in held}, sum(each.slot == "conv_states" for each, _ in held))
        for each, value in held:
            if each.grows:
                setattr(layer, each.slot, value)
                layer.dtype, layer.device, layer.is_initialized = value.dtype, value.device, True
            else:
                layer.hold(each.slot, each.index, value)
        if i < len(cache.layers):
            cache.layers[i] = layer
        else:
            cache.layers.append(layer)
    return cache


def held_by(cache: Any, kept: Sequence[Kept]) -> list[torch.Tensor]:
    """The tensors of a cache, in the order of `kept`."""
    out = []
    for each in kept:
        held = getattr(cache.layers[each.layer], each.slot)
        out.append(held if each.grows else held[each.index])
    return out


def _layer(slots: set[str], states: int) -> Any:
    """A layer of a cache: growing keys and values, states, or both."""
    from transformers.cache_utils import DynamicLayer

    grows = "keys" in slots
    if slots <= {"keys", "values"}:
        return DynamicLayer()
    return (_both() if grows else _states())(number_of_states=max(states, 1))


def _states() -> Any:
    """A class of layers whose states are given and replaced, never written to: they are inputs of a graph.

    A model sees a state from before, which is all zeros for the first tokens: the same as none.
    """
    from transformers.cache_utils import LinearAttentionLayer

    class States(LinearAttentionLayer):  # type: ignore[misc]
        def hold(self, slot: str, index: int, value: torch.Tensor) -> None:
            getattr(self, slot)[index] = value
            self.has_previous_state[index] = True
            self.dtype, self.device = value.dtype, value.device
            if slot == "conv_states":
                self.conv_kernel_size[index] = value.shape[-1]
                self.is_conv_states_initialized[index] = True
            else:
                self.is_recurrent_states_initialized[index] = True

        def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **others: Any) -> torch.Tensor:
            whole = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
            self.conv_states[state_idx] = whole[..., -self.conv_kernel_size[state_idx] :]
            return whole

        def update_recurrent_state(
            self, recurrent_states: torch.Tensor, state_idx: int = 0, **others: Any
        ) -> torch.Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            return recurrent_states

    return States


def _both() -> Any:
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

    states = _states()

    class Both(states, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc,valid-type]
        def __init__(self, number_of_states: int = 1) -> None:
            LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=number_of_states)

        def lazy_initialization(self, *keys_and_values: torch.Tensor, **others: Any) -> None:
            DynamicLayer.lazy_initialization(self, *keys_and_values)

    return Both
