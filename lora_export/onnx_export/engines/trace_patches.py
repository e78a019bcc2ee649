"""What of PyTorch is replaced while a model is traced, and why: the only place for it.

Each replacement gives what the original gives for every input that the model takes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Replacement = Callable[..., Any]


@contextlib.contextmanager
def applied(model: Any) -> Iterator[None]:
    """Inside, code that asks for values of tensors does without them."""
    replaced = dict(_ALWAYS)
    if model.config.is_encoder_decoder and type(model).__name__.endswith("ForSequenceClassification"):
        replaced |= _LAST_END
    with _Replaced(replaced):
        yield


class _Replaced(TorchFunctionMode):
    """Calls a replacement first; the original where that returns NotImplemented."""

    def __init__(self, replaced: Mapping[Any, Replacement]) -> None:
        super().__init__()
        self._replaced = replaced

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        replacement = self._replaced.get(func)
        if replacement is not None:
            result = replacement(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


# --- classifiers of encoder-decoders, which pool where a text ends ------------------------------------------------


def _one_count(counts: torch.Tensor, **others: Any) -> Any:
    """BART refuses rows with different numbers of ends; a graph cannot, and takes the last end of each."""
    return counts[:1]


def _last_of_each_row(states: torch.Tensor, index: Any) -> Any:
    """`states[mask, :]`, whose size depends on values, is only asked for the last row that the mask selects."""
    if not isinstance(index, tuple) or not isinstance(index[0], torch.Tensor) or index[0].dtype != torch.bool:
        return NotImplemented
    mask = index[0]
    places = torch.arange(mask.shape[1], device=mask.device)[None] * mask.to(torch.int64)
    last = places.argmax(1)[:, None, None].expand(-1, 1, states.shape[-1])
    return states.gather(1, last)[:, 0]


_LAST_END: Mapping[Any, Replacement] = {
    torch.unique_consecutive: _one_count,
    torch.Tensor.__getitem__: _last_of_each_row,
}
_ALWAYS: Mapping[Any, Replacement] = {}
