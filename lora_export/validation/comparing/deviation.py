"""Where a merged model goes wrong: the first module, in the order of the forward pass, that answers otherwise.

While the unmerged model runs, each of its modules' inputs are given to the merged model's module of the same path
as well. What went wrong upstream therefore does not matter, and a module that differs is itself at fault. A
module's noise floor is measured as that of the whole model is: its weights moved by rounding errors of its type.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_export.contracts import Deviation
from lora_export.validation.comparing.noise import rounding_errors
from lora_export.validation.comparing.thresholds import FACTOR, FP32_ARITHMETIC
from lora_export.validation.reference.probes import base_layer, generator_of, random_signs, wrapped_modules
from lora_export.validation.reference.streaming import holding, present

DRAWS = 2
INCOMPARABLE = 1.7e308  # outputs of other shapes, or not finite: JSON has no infinity


@torch.inference_mode()
def first_deviation(
    unmerged: Any,
    merged: nn.Module,
    run: Callable[[], Any],
    dtypes: Mapping[str, torch.dtype],
    weight_errors: Sequence[str],
    factor: float = FACTOR,
) -> Deviation | None:
    """The first module at fault, or None if modules and tensors show none.

    run: one forward of the unmerged model, without a cache (the merged modules would add to it); dtypes: the
    stored type of each merged tensor; weight_errors: tensors known to be wrong, worst first. Modules that hold
    weights come first, then those around them, for a fault in none of the tensors (such as a changed setting).
    Where no output shows what a wrong tensor does, the first module that holds one is named, with its own figures.
    """
    plain = dict(merged.named_modules())
    holding = {name for name, module in plain.items() if next(module.parameters(recurse=False), None) is not None}
    seen = _walk(unmerged, plain, holding, run, dtypes, factor)
    first = next((s for s in seen if s.value > factor * s.floor), None)
    if first is None and not weight_errors:
        around = _walk(unmerged, plain, set(plain) - holding - {""}, run, dtypes, factor)
        first = next((s for s in around if s.value > factor * s.floor), None)
    if first is None:
        first = next((s for s in seen if _within(s.module, weight_errors)), None)
    if first is None:
        return _unreached(weight_errors)
    return Deviation(first.module, first.value, first.floor, _within(first.module, weight_errors))


def _within(module: str, tensors: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in tensors if name.startswith(f"{module}."))


def _unreached(weight_errors: Sequence[str]) -> Deviation | None:
    """A wrong tensor of a module that this forward does not use."""
    if not weight_errors:
        return None
    module = weight_errors[0].rpartition(".")[0]
    return Deviation(module, 0.0, 0.0, _within(module, weight_errors))


def _walk(
    unmerged: Any,
    plain: Mapping[str, nn.Module],
    names: set[str],
    run: Callable[[], Any],
    dtypes: Mapping[str, torch.dtype],
    factor: float,
) -> list[Deviation]:
    """Value and floor of each named module, in the order in which the unmerged model leaves them, up to the first
    value that is above `factor` floors."""
    seen: dict[str, Deviation] = {}
    parted = False

    def compare(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal parted
            if not parted and name not in seen:
                with present(plain[name]):
                    seen[name] = _compare(name, plain[name], args, kwargs, output, dtypes)
                parted = seen[name].value > factor * seen[name].floor

        return hook

    with ExitStack() as hooks:
        for name, module in unmerged.base_model.model.named_modules():
            if name in names:
                handle = module.register_forward_hook(compare(name), with_kwargs=True)
                hooks.callback(handle.remove)
        run()
    return list(seen.values())


def _compare(
    name: str, module: nn.Module, args: Any, kwargs: Any, output: Any, dtypes: Mapping[str, torch.dtype]
) -> Deviation:
    wanted = list(tensors_of(output))
    try:
        actual = list(tensors_of(module(*args, **kwargs)))
    except (RuntimeError, ValueError, TypeError, IndexError):  # a weight of another shape, for one
        return Deviation(name, INCOMPARABLE, 0.0)
    value = _distance(wanted, actual)
    floor = max((float(t.abs().max()) for t in wanted if t.numel()), default=0.0) * FP32_ARITHMETIC
    if value <= floor:  # nothing was added and nothing rounded: most modules, and no draw is needed
        return Deviation(name, value, floor)
    draws = []
    for seed in range(DRAWS):
        with holding(_noisy(name, module, dtypes, seed)):
            draws.append(_distance(actual, list(tensors_of(module(*args, **kwargs)))))
    noise = max(draws)
    return Deviation(name, value, floor + (noise if math.isfinite(noise) else 0.0))


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of a module's output, whatever it is wrapped in; caches are left out."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_of(value)


def _distance(wanted: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    if [t.shape for t in wanted] != [t.shape for t in actual]:
        return INCOMPARABLE
    worst = max((float((a - b).abs().max()) for a, b in zip(wanted, actual, strict=True) if a.numel()), default=0.0)
    return worst if math.isfinite(worst) else INCOMPARABLE


def _noisy(
    path: str, module: nn.Module, dtypes: Mapping[str, torch.dtype], seed: int
) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """The module's parameters, each with rounding errors of its type."""
    generator = torch.Generator().manual_seed(seed)
    coarsest = max(dtypes.values(), key=lambda d: torch.finfo(d).eps)
    for name, parameter in module.named_parameters():
        errors = rounding_errors(parameter.data, dtypes.get(f"{path}.{name}", coarsest), generator)
        yield parameter, parameter.data + errors


ASKED = 4  # random inputs, of which one at least shows whether there is an update


@torch.inference_mode()
def unused_updates(unmerged: Any, run: Callable[[], Any]) -> tuple[str, ...]:
    """Paths of the wrapped layers whose weight the module around them uses, and whose update it does not.

    PEFT puts a layer of its own around a linear layer and adds the update when that is called. Some modules never
    call it: nn.MultiheadAttention reads `out_proj.weight` and multiplies by it itself. The adapter was then trained
    without that update, and no merged weight can both have it and compute what the unmerged model computes.

    run: one forward of the unmerged model. A layer that no input reaches is none of them: there the module's output
    does not depend on the weight, either. Nor is one whose update is zero.
    """
    model = unmerged.base_model.model
    around: dict[str, dict[str, Any]] = {}
    for path, wrapper in wrapped_modules(model).items():
        if _asks_by_calling(wrapper):
            around.setdefault(path.rpartition(".")[0], {})[path] = wrapper
    called: set[str] = set()
    unused: dict[str, Any] = {}
    asking = False

    def note(path: str) -> Callable[..., None]:
        return lambda *_: called.add(path)

    def ask(wrappers: Mapping[str, Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal asking
            if asking:
                return
            asking = True
            try:
                for path, wrapper in wrappers.items():
                    if (
                        path not in called
                        and path not in unused
                        and _depends(module, wrapper, args, kwargs, output)
                    ):
                        unused[path] = wrapper
            finally:
                asking = False

        return hook

    with ExitStack() as hooks:
        for parent, wrappers in around.items():
            for path, wrapper in wrappers.items():
                hooks.callback(wrapper.register_forward_pre_hook(note(path)).remove)
            handle = model.get_submodule(parent).register_forward_hook(ask(wrappers), with_kwargs=True)
            hooks.callback(handle.remove)
        run()
    return tuple(path for path, wrapper in unused.items() if path not in called and _changes(path, wrapper))


def unused_advice(modules: tuple[str, ...]) -> str:
    """What it means, and what to do."""
    names = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    which = "this layer" if len(modules) == 1 else "these layers"
    return (
        f"The reference does not use the adapter's update of {names}: the module around it reads the weight and "
        f"never calls {which}, so PEFT's unmerged model ignores the update, and did so in training. The merged "
        f"weight has it, and is not the model that was trained. Delete the tensors of {which} from the adapter, or "
        "train with exclude_modules. Keep them only if a program trained the adapter that does apply the update."
    )


def _asks_by_calling(wrapper: Any) -> bool:
    """Whether a wrapper adds its update in its own forward. Those of parameters put it into the weight, and what
    was saved whole is there wherever it is read."""
    plain = isinstance(base_layer(wrapper), nn.Linear) and isinstance(wrapper, BaseTunerLayer)
    return plain and not hasattr(wrapper, "parameter_name")


def _depends(module: nn.Module, wrapper: Any, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether the module's output is another with another weight."""
    generator = torch.Generator().manual_seed(0)
    weights = [base_layer(wrapper).weight]
    others = ((w, w.data + torch.randn(w.shape, generator=generator).to(w)) for w in weights)
    with present(module), holding(others):
        changed = list(tensors_of(module(*args, **kwargs)))
    plain = list(tensors_of(output))
    return len(changed) != len(plain) or any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


def _changes(path: str, wrapper: Any) -> bool:
    with present(wrapper):
        inputs = random_signs(wrapper, ASKED, generator_of(0, path)).float()
        return not torch.equal(wrapper(inputs), base_layer(wrapper)(inputs))
