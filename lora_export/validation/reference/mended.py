"""Where PEFT's own layers do not answer what validation asks: mended on the layers, not on their formulas."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

# What a kind's change is proportional to, where PEFT's layers have no scaling: a weight of the adapter goes there.
_PROPORTIONAL = (
    "adamss_B",
    "beft_bias",
    "pvera_lambda_b",
    "supertuning_values",
    "tinylora_B",
    "unilora_scales_B",
    "vera_lambda_b",
)
# Loading these, PEFT decomposes the base.
DECOMPOSING = frozenset({"ADAMSS", "FROD", "OSF", "PSOFT", "TINYLORA"})


def kind_of(config: Any) -> str:
    """PEFT's word for the kind, of a configuration as PEFT reads it."""
    return str(getattr(config.peft_type, "value", config.peft_type))


@contextlib.contextmanager
def repeatable(configs: Iterable[Any]) -> Iterator[None]:
    """Inside, PEFT decomposes the base on one thread, as a merge does.

    With several, fp32 sums are added up in another order, and close singular values make something else of that.
    """
    before = torch.get_num_threads()
    if any(kind_of(c) in DECOMPOSING for c in configs):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mend(unmerged: nn.Module) -> None:
    """AdaMSS casts its input to the type that the base had when it was built, whatever the base has become.

    FRoD makes its weight of what it took out of the base when it was built: errors in the base do not reach its
    outputs.
    """
    for module in unmerged.modules():
        if type(module).__module__ == "peft.tuners.adamss.layer" and hasattr(module, "dtype"):
            module.__class__ = _of_now(type(module))
        elif type(module).__module__ == "peft.tuners.frod.layer" and hasattr(module, "base_layer"):
            weight = module.get_base_layer().weight  # type: ignore[operator]
            object.__setattr__(module, "first_weight", weight.detach().clone())
            module.__class__ = _with_later_changes(type(module))


def weigh(unmerged: nn.Module, weights: Mapping[str, float]) -> None:
    """Multiply what each adapter adds by its weight: by the layers' scaling, or where a kind's layers have none of
    their own by what its change is proportional to."""
    for module in unmerged.modules():
        for adapter, weight in weights.items():
            if weight != 1.0:
                _weigh(module, adapter, weight)


def _weigh(module: nn.Module, adapter: str, weight: float) -> None:
    for attribute in ("scaling", "supertuning_lora_alpha"):
        factors = getattr(module, attribute, None)
        if isinstance(factors, dict) and adapter in factors:
            factors[adapter] *= weight
    for attribute in _PROPORTIONAL:
        held: Any = getattr(module, attribute, None)
        if held is not None and attribute in module.__dict__.get("_modules", {}) and adapter in held:
            values = held[adapter]
            for value in values if isinstance(values, nn.ParameterList) else [values]:
                value.data.mul_(weight)


def _of_now(plain: type) -> type:
    def get(self: Any) -> torch.dtype:
        dtype: torch.dtype = self.get_base_layer().weight.dtype
        return dtype

    def ignore(self: Any, _: torch.dtype) -> None:
        """PEFT sets it once."""

    return type(plain.__name__, (plain,), {"dtype": property(get, ignore), "__module__": plain.__module__})


def _with_later_changes(plain: Any) -> type:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        answer: torch.Tensor = plain.forward(self, x, *args, **kwargs)
        weight = self.get_base_layer().weight
        change = weight - self.first_weight.to(weight.dtype)
        if not change.any():
            return answer
        changed: torch.Tensor = answer + x @ (change if self.fan_in_fan_out else change.T)
        return changed

    return type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})
