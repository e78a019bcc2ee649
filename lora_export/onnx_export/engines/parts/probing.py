"""What a model's forward takes and returns, found by running it on tensors that have a shape and no values."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lora_export.errors import ExportError
from lora_export.onnx_export.engines import trace_patches
from lora_export.onnx_export.engines.parts import shapes
from lora_export.onnx_export.engines.parts.graph_part import LENGTH, Input

_MORE = {"text_batch_size": 2, "sequence_length": 5}  # unlike those of other axes
_RANDOM = ("rand", "randn", "rand_like", "randn_like", "randint", "randperm", "normal", "bernoulli", "multinomial")


@dataclass(frozen=True)
class Forward:
    """One way to call a model: its inputs by name, and the arguments that stay as they are."""

    inputs: Mapping[str, Input]
    fixed: Mapping[str, Any]

    def __call__(self, model: Any, values: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        result: Mapping[str, Any] = model(**values, **self.fixed)
        return result

    def resized(self) -> "Forward":
        """The same call with other sizes along the dynamic axes."""
        inputs = {}
        for name, (shape, dtype, axes) in self.inputs.items():
            new = tuple(_other(size, axes.get(i)) for i, size in enumerate(shape))
            inputs[name] = (new, dtype, axes)
        return replace(self, inputs=inputs)


def _other(size: int, axis: str | None) -> int:
    """Pictures and sounds come as multiples of what the model needs."""
    if axis is None:
        return size
    return size + _MORE.get(axis, 1) if size <= LENGTH else 2 * size


def outputs(model: Any, forward: Forward) -> Mapping[str, Any]:
    """What forward returns for these sizes: tensors without values, by name.

    Raises what forward raises, and ExportError for one that draws random numbers.
    """
    replaced, kept = trace_patches.applied(model), trace_patches.unchanged(model)
    with shapes.shapes_only(), replaced, kept, _Drawn() as drawn:
        values = {n: torch.zeros(shape, dtype=dtype) for n, (shape, dtype, _) in forward.inputs.items()}
        result: Mapping[str, Any] = shapes.call(model, **values, **forward.fixed)
    if drawn.names:
        drew = ", ".join(f"torch.{name}" for name in sorted(drawn.names))
        raise ExportError(
            f"{type(model).__name__} draws random numbers in its forward ({drew}): its answers to the same inputs "
            "differ, and no graph can be compared with it"
        )
    return result


class _Drawn(TorchFunctionMode):
    """The functions that made random tensors; single numbers, which skip layers in training, do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name in _RANDOM and isinstance(result, torch.Tensor) and result.dim() > 0:
            self.names.add(name)
        return result


@dataclass(frozen=True)
class Accepted:
    """A call that a model takes, and what it returns: at the sizes to trace with, and at others."""

    forward: Forward
    returned: Mapping[str, Any]
    resized: Mapping[str, Any]

    def changing(self, name: str) -> list[int]:
        """The axes of an output whose sizes follow those of the inputs."""
        one, other = self.returned[name].shape, self.resized[name].shape
        return [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]


def first_accepted(model: Any, calls: Sequence[Forward]) -> Accepted:
    """The first call that the model takes at two sizes.

    Raises ExportError with the model's own words where it takes none.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs each refusal
    refusals: list[str] = []
    for forward in calls:
        try:
            resized = outputs(model, forward.resized())
            return Accepted(forward, outputs(model, forward), resized)
        except ExportError:
            raise
        except Exception as error:  # whatever a model says of inputs that it does not take
            _refuse_sizes_from_values(model, error)
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            refusals.append(f"{', '.join(forward.inputs)}: {type(error).__name__}: {words[:200]}")
    raise ExportError(
        f"no inputs are known that the forward of {type(model).__name__} takes; tried "
        + "; ".join(dict.fromkeys(refusals))
    )


def _refuse_sizes_from_values(model: Any, error: Exception) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException | GuardOnDataDependentSymNode):
        raise ExportError(
            f"a size or a branch in the forward of {type(model).__name__} depends on the values of its inputs"
        ) from error
