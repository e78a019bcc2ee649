"""What of PyTorch is replaced while a model is traced, and why. What a module itself does otherwise is in
`parts/traceable.py`.

Each replacement gives what the original gives for every input that the model takes.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Replacement = Callable[..., Any]


@contextlib.contextmanager
def applied(model: Any) -> Iterator[None]:
    """Inside, code that asks for values of tensors does without them."""
    replaced = dict(_ALWAYS)
    if type(model).__name__.endswith("ForSequenceClassification") and model.config.is_encoder_decoder:
        replaced |= _LAST_END
    with Replaced(replaced), _symbolic_numbers(model), _nothing_remembered(model):
        yield


@contextlib.contextmanager
def _nothing_remembered(model: Any) -> Iterator[None]:
    """transformers keeps what some functions have returned (places of patches, anchors): tensors of
    one trace have no values, and would come back in the next one and in a proof."""
    places = [*(sys.modules[name] for name in _modules_of(model)), *{type(module) for module in model.modules()}]
    found = [value for place in places for value in vars(place).values()]
    found += [cell.cell_contents for value in found for cell in getattr(value, "__closure__", None) or ()]
    clearing = [value.cache_clear for value in found if callable(getattr(value, "cache_clear", None))]
    for clear in clearing:
        clear()
    try:
        yield
    finally:
        for clear in clearing:
            clear()


def _modules_of(model: Any) -> set[str]:
    names = {type(module).__module__ for module in model.modules()}
    return {name for name in names if name.startswith("transformers.")}


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Afterwards, the modules have the attributes that they had: Swin and BigBird keep for ever what they once did
    for a small input. Tables of hooks are theirs too: transformers adds some with its first call, and notes it."""
    before = [(module, {n: _copied(value) for n, value in vars(module).items()}) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value


@contextlib.contextmanager
def _symbolic_numbers(model: Any) -> Iterator[None]:
    """`len`, `int` and transformers' `torch_int` give an int of Python, which fixes an axis; the modules of the
    model get others that do not. Modules that name `int` as a type of tensors (BigBird) need the real one."""
    modules = [vars(sys.modules[name]) for name in _modules_of(model)]
    before = [{name: module[name] for name in _NUMBERS if name in module} for module in modules]
    for module in modules:
        kept = {"int"} if "dtype=int," in inspect.getsource(sys.modules[module["__name__"]]) else set()
        kept |= set() if "torch_int" in module else {"torch_int"}
        module.update({name: new for name, new in _NUMBERS.items() if name not in kept})
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            for name in _NUMBERS:
                module.pop(name, None)
            module.update(old)


def _len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) else len(value)


class _Ints(type):
    """Makes `int` of a size that is not known yet another such size; all else is as with Python's int."""

    def __call__(cls, *values: Any, **others: Any) -> Any:
        if len(values) == 1 and isinstance(values[0], torch.SymInt | torch.SymFloat):
            return torch.sym_int(values[0])  # type: ignore[no-untyped-call]
        return int(*values, **others)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)


class _Int(metaclass=_Ints):
    pass


_NUMBERS: Mapping[str, Any] = {"len": _len, "int": _Int, "torch_int": torch.sym_int}


class Replaced(TorchFunctionMode):
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


# --- pooling to a size that does not divide the picture -----------------------------------------------------------


def _pooled(states: torch.Tensor, output_size: Any) -> Any:
    """PyTorch's decomposition for dynamic sizes reads elements that are not there once it runs as a graph.

    Each output is a mean over rows and columns, so two matrices of shares do the same.
    """
    sizes = output_size if isinstance(output_size, list | tuple) else (output_size, output_size)
    if states.dim() != 4 or None in sizes or set(sizes) == {1}:
        return NotImplemented
    if all(isinstance(n, int) for n in states.shape[-2:]):
        return NotImplemented
    rows, columns = (_shares(n, out, states) for n, out in zip(states.shape[-2:], sizes, strict=True))
    return rows @ states @ columns.transpose(0, 1)


def _shares(size: Any, out: int, like: torch.Tensor) -> torch.Tensor:
    """(out, size): the share of each element in each mean, which is over floor(i · size / out) up to
    ceil((i + 1) · size / out)."""
    at, places = torch.arange(size, device=like.device)[None], torch.arange(out, device=like.device)[:, None]
    start, end = places * size // out, ((places + 1) * size + out - 1) // out
    inside = ((at >= start) & (at < end)).to(like.dtype)
    shares: torch.Tensor = inside / (end - start).to(like.dtype)
    return shares


_ALWAYS: Mapping[Any, Replacement] = {torch.nn.functional.adaptive_avg_pool2d: _pooled}
