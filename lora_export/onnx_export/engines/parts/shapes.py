"""What a model computes, as shapes alone: nothing is read of its weights, and nothing is calculated."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, new tensors have a shape and a type, and no values."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        yield


def call(module: torch.nn.Module, **given: Any) -> Any:
    """What `module` returns for these inputs. Only inside `shapes_only`."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    return torch.func.functional_call(module, empty, (), given)
