"""Updates that PEFT's unmerged forward does not use, though the merged weight has them.

PEFT puts a layer of its own around a linear layer and adds the update when that is called. Some modules never call
it: nn.MultiheadAttention reads `out_proj.weight` and multiplies by it itself. The adapter was then trained without
that update, and no merged weight can both have it and compute what the unmerged model computes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lora_export.validation.comparing.deviation import tensors_of
from lora_export.validation.reference.probes import base_layer, generator_of, random_signs, wrapped_modules
from lora_export.validation.reference.streaming import present

ASKED = 4  # random inputs, of which one at least shows whether there is an update


@torch.inference_mode()
def unused_updates(unmerged: Any, run: Callable[[], Any]) -> tuple[str, ...]:
    """Paths of the wrapped layers whose weight the module around them uses, and whose update it does not.

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


def advice(modules: tuple[str, ...]) -> str:
    """What it means and what to do, in one sentence each."""
    names = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    which = "this layer" if len(modules) == 1 else "these layers"
    return (
        f"The reference does not use the adapter's update of {names}: the module around it reads the weight and "
        f"never calls {which}, so that PEFT's unmerged model computes as if there were none, in training, too. The "
        "merged weight has the update, and is another model than the one that was trained. Take it out: delete the "
        f"tensors of {which} from the adapter, or train with exclude_modules. Keep it only if the adapter was "
        "trained by a program that does apply it."
    )


def _asks_by_calling(wrapper: Any) -> bool:
    """Whether a wrapper adds its update in its own forward. Those of parameters put it into the weight, and what
    was saved whole is there wherever it is read."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = isinstance(base_layer(wrapper), nn.Linear) and isinstance(wrapper, BaseTunerLayer)
    return plain and not hasattr(wrapper, "parameter_name")


def _depends(module: nn.Module, wrapper: Any, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether the module's output is another with another weight."""
    with present(module), _another_weight(base_layer(wrapper)):
        changed = list(tensors_of(module(*args, **kwargs)))
    plain = list(tensors_of(output))
    return len(changed) != len(plain) or any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


@contextmanager
def _another_weight(layer: Any) -> Iterator[None]:
    before = layer.weight.data
    generator = torch.Generator().manual_seed(0)
    layer.weight.data = before + torch.randn(before.shape, generator=generator).to(before)
    try:
        yield
    finally:
        layer.weight.data = before


def _changes(path: str, wrapper: Any) -> bool:
    with present(wrapper):
        inputs = random_signs(wrapper, ASKED, generator_of(0, path)).float()
        return not torch.equal(wrapper(inputs), base_layer(wrapper)(inputs))
