"""What the arithmetic of a type does to a model's outputs, measured in PyTorch.

An exported graph computes the same sums in another order, in a narrower type, or on inputs of 8 bits. Each of these
is tried out here on the unmerged model itself. So no noise floor is ever taken from the graph that is judged by it.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from lora_export.validation.comparing.noise import base_parameters
from lora_export.validation.reference import streaming
from lora_export.validation.reference.probes import base_layer, is_below, wrapped_modules

Measured = TypeVar("Measured")
# Operators that add up products or squares: the order of their sums is what differs between implementations.
_SUMS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "convolution", "sum", "mean", "var_mean", "_softmax", "_log_softmax",
        "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "cumsum",
        "linalg_vector_norm", "rsqrt", "pow", "exp",
    )
)  # fmt: skip
EIGHT_BITS = 127.0  # the largest of the numbers that a scale is shared by


@dataclass(frozen=True)
class Arithmetic:
    """How a graph computes.

    dtype: of its activations; inputs: elements of a product's input that share a scale of 8 bits (0: a whole
    tensor, None: inputs are not quantized); layers: the linear layers whose inputs are, by the path of the plain
    model (None: all); weights: those layers' weights have 8 bits as well, a scale for each output.
    """

    dtype: torch.dtype = torch.float32
    inputs: int | None = None
    layers: frozenset[str] | None = None
    weights: bool = False

    @property
    def words(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        often = f", {self.times} times" if self.times > 1 else ""
        return f"arithmetic in {name}{often}" + ("" if self.inputs is None else " on inputs of 8 bits")

    @property
    def times(self) -> int:
        """How often its noise counts. In 16 bits PyTorch stays in fp32 within norms and softmax, where a graph may
        round: T5's fp16 graph differs by more than twice as much as PyTorch's fp16 does, beside the tolerance."""
        return 1 if self.dtype == torch.float32 else 3

    def in_bfloat16(self) -> "Arithmetic":
        return replace(self, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def on(self, unmerged: Any, names: Collection[str]) -> Iterator[None]:
        """Inside, PEFT's unmerged model computes so; fp32 itself is held against float64. names: the base's
        parameters, by plain name."""
        with contextlib.ExitStack() as stack:
            if self.inputs is not None:
                stack.enter_context(eight_bit_inputs(unmerged, self.inputs, self.layers))
            if self.weights:
                stack.enter_context(eight_bit_weights(unmerged))
            if self.dtype == torch.float32:
                stack.enter_context(in_double())
            else:
                stack.enter_context(in_types(unmerged, dict.fromkeys(names, self.dtype)))
            yield


@dataclass(frozen=True)
class InTypes:
    """Weights and arithmetic as a folder is loaded: dtypes, of its parameters by plain name."""

    dtypes: Mapping[str, torch.dtype]

    def on(self, unmerged: Any, names: Collection[str]) -> contextlib.AbstractContextManager[None]:
        return in_types(unmerged, self.dtypes)

    def in_bfloat16(self) -> "InTypes":
        return InTypes(dict.fromkeys(self.dtypes, torch.bfloat16))


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Inside, every sum of fp32 numbers is computed in float64 and rounded once."""
    with _Double():  # type: ignore[no-untyped-call]
        yield


class _Double(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _SUMS:
            return func(*args, **kwargs)
        if not any(isinstance(a, torch.Tensor) and a.dtype == torch.float32 for a in args):
            return func(*args, **kwargs)
        wide = tree_map(_widened, (args, kwargs))
        return tree_map(_narrowed, func(*wide[0], **wide[1]))


def _widened(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    fp32 = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.double() if fp32 else value


def _narrowed(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value


@contextlib.contextmanager
def in_types(unmerged: Any, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inside, the model computes in the types of `dtypes` (by plain name), as transformers would load and run it.

    Its parameters have these types. Buffers, such as the frequencies of rotary embeddings, stay in fp32, and so do
    an adapter's own matrices: PEFT casts between the two, as in training.
    """
    widest = max(dtypes.values(), key=lambda d: torch.finfo(d).eps)
    model = unmerged.base_model.model
    types = {slot.name: widest for slot in streaming.slots_of(model)}
    types |= {name: dtype for name, _, dtype in base_parameters(unmerged, dtypes)}
    types |= {name: widest for name, _ in model.named_parameters() if ".modules_to_save." in name}

    def narrow(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(types[name]) if name in types else weight

    with streaming.changing(unmerged, narrow), _inputs_in(model, widest):
        yield


@contextlib.contextmanager
def _inputs_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, sounds and images reach the model in `dtype`, as its user has to give them."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def narrow(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tree_map(cast, args), {name: tree_map(cast, value) for name, value in kwargs.items()}

    handle = model.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def eight_bit_inputs(unmerged: Any, block: int, layers: Collection[str] | None) -> Iterator[None]:
    """Inside, the inputs of linear layers have 8 bits: `block` elements share a scale (0: a whole tensor).

    layers: None for all; all, too, where some of these names are a file's and not the model's.
    """
    linear = dict(_linear_layers(unmerged.base_model.model))
    paths = linear if layers is None or not set(layers) <= linear.keys() else layers

    def rounded(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (eight_bits(args[0], block), *args[1:])

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(linear[path].register_forward_pre_hook(rounded).remove)
        yield


@contextlib.contextmanager
def eight_bit_weights(unmerged: Any) -> Iterator[None]:
    """Inside, the weights of the base's linear layers have 8 bits, each output a scale of its own."""
    layers = [base_layer(module) for _, module in _linear_layers(unmerged.base_model.model)]
    widths = {id(layer.weight): 0 if isinstance(layer, Conv1D) else 1 for layer in layers}
    names = {n: widths[id(p)] for n, p in unmerged.base_model.model.named_parameters() if id(p) in widths}

    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return weight
        rows = weight.T if names[name] == 0 else weight
        eight = eight_bits(rows, rows.shape[-1])
        return eight.T.contiguous() if names[name] == 0 else eight

    with streaming.changing(unmerged, rounded):
        yield


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path → the outermost module there that is a linear layer, or PEFT's wrapper of one."""
    wrapped = wrapped_modules(model)
    for path, module in model.named_modules():
        if (isinstance(module, nn.Linear | Conv1D) or _wraps_linear(module)) and not is_below(path, wrapped):
            yield path, module


def _wraps_linear(module: Any) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Linear | Conv1D)


def eight_bits(values: torch.Tensor, block: int) -> torch.Tensor:
    if not values.is_floating_point():
        return values
    width = values.shape[-1]
    size = block or values.numel()
    flat = values.reshape(-1, width) if block else values.reshape(1, -1)
    padded = nn.functional.pad(flat, (0, -flat.shape[-1] % size)).reshape(flat.shape[0], -1, size)
    scale = padded.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) / EIGHT_BITS
    rounded = (torch.round(padded / scale) * scale).reshape(flat.shape[0], -1)[:, : flat.shape[-1]]
    return rounded.reshape(values.shape)


def draw(
    unmerged: Any,
    how: Arithmetic | InTypes,
    names: Collection[str],
    measure: Callable[[bool], Measured],
    finite: Callable[[Measured], bool],
    adapted: bool = True,
) -> Measured:
    """What `measure` returns while the unmerged model computes as `how` says. names: the base's parameters.

    adapted: with the adapter active, as measure is told: PEFT has no kernel in 16 bits for a few kinds, and then
    the base alone is measured. An outcome that is not finite (fp16 overflows in PyTorch) is measured again in bf16,
    whose errors are larger.
    """
    try:
        with contextlib.nullcontext() if adapted else unmerged.disable_adapter(), how.on(unmerged, names):
            measured = measure(adapted)
    except (RuntimeError, NotImplementedError):
        if not adapted:
            raise
        return draw(unmerged, how, names, measure, finite, adapted=False)
    wider = how.in_bfloat16()
    return measured if finite(measured) or how == wider else draw(unmerged, wider, names, measure, finite, adapted)
