"""How far the arithmetic of a graph may be from PyTorch's, tried out on the PyTorch models themselves."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lora_export.validation.comparing.arithmetic import Arithmetic, eight_bits, in_double
from lora_export.validation.pipelines.loading import Modules

UNIT = 2.0**-23  # of a timestep: what its product with a rounded frequency may be off by
_TIMES = ("timestep", "guidance")


def computing(how: Arithmetic) -> contextlib.AbstractContextManager[Any]:
    """Inside, models in fp32 compute in a type; fp32 itself is held against float64."""
    return in_double() if how.dtype == torch.float32 else _InType(how.dtype)


@contextlib.contextmanager
def eight_bit_inputs(model: nn.Module, how: Arithmetic) -> Iterator[None]:
    """Inside, the layers whose products a quantized graph computes on 8 bits get inputs of 8 bits."""
    block = how.inputs

    def rounded(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (eight_bits(args[0], block or 0), *args[1:])

    with contextlib.ExitStack() as stack:
        places = Modules(model)
        for name in how.layers or () if block is not None else ():
            stack.callback(places.find(name)[1].register_forward_pre_hook(rounded).remove)
        yield


class _InType(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every fp32 number that an operator reads or writes is rounded to a type: weights, too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Timesteps and what is computed of them alone stay in fp32 in graphs, too.
        small = all(a.numel() < 2 for a in args if isinstance(a, torch.Tensor))
        if small or func.overloadpacket in _KEPT:
            return func(*args, **(kwargs or {}))
        rounded = tree_map(self._rounded, (args, kwargs or {}))
        return tree_map(self._rounded, func(*rounded[0], **rounded[1]))

    def _rounded(self, value: Any) -> Any:
        fp32 = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(self.dtype).float() if fp32 else value


_KEPT = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "_to_copy",
        "copy_",
        "view",
        "detach",
        "alias",
        "expand",
        "sin",
        "cos",
        "exp",
        "clone",
        "empty_like",
    )
)


@contextlib.contextmanager
def moved_times(denoiser: Any) -> Iterator[None]:
    """Inside, a denoiser is told its timestep and guidance with an error of fp32: their sines and cosines follow
    the last place of products that are up to a thousand."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    def moved(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in _TIMES:
            if isinstance(given.get(name), torch.Tensor):
                given[name] = given[name].float() * (1 + UNIT)
        return (), given

    handle = denoiser.register_forward_pre_hook(moved, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
