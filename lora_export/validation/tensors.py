"""Every tensor of the merged model against what PEFT's unmerged modules compute in float64.

Model outputs cannot show a fine fault (one projection scaled by 1.02 hides in bf16 rounding); tensors can.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_export.validation.effective import (
    Probe,
    answers,
    effective_parameters,
    make_probe,
    plain_parameters,
    wrapped_modules,
)
from lora_export.validation.streaming import present

ARITHMETIC = 2.0**-22  # of |W|: what fp32 additions may lose
DEVIATIONS = 4.0  # times the fp32 error of the unmerged module itself
# PEFT takes the residual of PiSSA and OLoRA out of the base by an fp32 decomposition: an error of this share of the
# largest weight, everywhere.
RECOMPUTED = 2.0**-20
BLOCK = 4096  # rows of an untouched tensor that are compared at once
EXPERTS = 8  # of a fused weight are compared, unless all rows are asked for


@dataclass(frozen=True)
class TensorError:
    """worst: the largest |merged − exact| in units of what rounding explains; above 1 is a fault."""

    name: str
    worst: float
    rows: int


def compare_tensors(
    unmerged: Any, merged: nn.Module, dtypes: Mapping[str, torch.dtype], rows: int | None
) -> list[TensorError]:
    """One entry for each tensor. rows: how many columns or rows of an updated one are compared (None: all)."""
    model = unmerged.base_model.model
    found = dict(merged.named_parameters(remove_duplicate=False))
    types = {n: dtypes.get(n) or dtypes[_first_name(merged, p)] for n, p in found.items()}
    wrapped = wrapped_modules(model)
    everywhere = RECOMPUTED if _recomputed(unmerged) else 0.0
    errors: dict[str, TensorError] = {}
    for name, exact in plain_parameters(model, wrapped):
        with present(exact, found.get(name)):
            errors[name] = _same(name, exact, found.get(name), types.get(name))
    for path, module in wrapped.items():
        with present(module, _submodule(merged, path)):
            for error in _wrapped(path, module, merged, types, rows, everywhere):
                errors.setdefault(error.name, error)
    for name in found.keys() - errors.keys():
        errors[name] = TensorError(name, float("inf"), 0)
    return list(errors.values())


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _first_name(model: nn.Module, parameter: torch.Tensor) -> str:
    return next(n for n, p in model.named_parameters() if p is parameter)


def _recomputed(unmerged: Any) -> bool:
    inits = (getattr(c, "init_lora_weights", True) for c in unmerged.peft_config.values())
    return any(isinstance(i, str) and i.lower() in ("pissa", "olora") for i in inits)


def _same(name: str, exact: torch.Tensor, found: torch.Tensor | None, dtype: torch.dtype | None) -> TensorError:
    """Nothing was added to this tensor, so nothing but the rounding to its type may differ."""
    if found is None or dtype is None or found.shape != exact.shape:
        return TensorError(name, float("inf"), 0)
    # In blocks of rows: an embedding is the largest tensor of many models, and a copy of it as large again.
    blocks = [slice(i, i + BLOCK) for i in range(0, len(exact), BLOCK)] if exact.dim() else [...]
    equal = all(torch.equal(exact.data[b].to(dtype).float(), found.data[b]) for b in blocks)
    return TensorError(name, 0.0 if equal else float("inf"), exact.shape[0] if exact.dim() else 1)


def _wrapped(
    path: str, module: Any, merged: nn.Module, types: Mapping[str, torch.dtype], rows: int | None, everywhere: float
) -> Iterator[TensorError]:
    from peft.utils.other import ModulesToSaveWrapper

    plain: Any = _submodule(merged, path)
    if plain is None:
        yield TensorError(path, float("inf"), 0)
        return
    if isinstance(module, ModulesToSaveWrapper):
        return
    if hasattr(module, "parameter_name"):
        yield from _parameters(path, module, plain, types, rows)
        return
    probe = make_probe(module, rows)
    if probe is None:
        yield TensorError(f"{path}.weight", float("inf"), 0)
    else:
        yield from _layer(path, module, plain, types, probe, everywhere)


def _layer(
    path: str, module: Any, plain: Any, types: Mapping[str, torch.dtype], probe: Probe, everywhere: float
) -> Iterator[TensorError]:
    """The merged layer gets the same probes, and a copy whose weights are the allowed errors gives the bound."""
    exact, exact_bias, deviation = answers(module, probe)
    bound = copy.deepcopy(plain).double()
    for name, parameter in bound.named_parameters():
        dtype = types[f"{path}.{name}"]
        size = parameter.data.abs()
        arithmetic = ARITHMETIC * size + everywhere * size.max() + DEVIATIONS * deviation
        parameter.data = _half_ulp(parameter.data, dtype) + arithmetic
    with torch.no_grad():
        copied = copy.deepcopy(plain).double()
        yield _worst(f"{path}.weight", copied(probe.inputs), exact, bound(probe.inputs))
        if probe.zeros is not None and getattr(plain, "bias", None) is not None:
            assert exact_bias is not None
            yield _worst(f"{path}.bias", copied(probe.zeros), exact_bias, bound(probe.zeros))


def _parameters(
    path: str, module: Any, plain: Any, types: Mapping[str, torch.dtype], rows: int | None
) -> Iterator[TensorError]:
    exact = effective_parameters(module)
    for name, parameter in plain.named_parameters():
        full = f"{path}.{name}"
        if name not in exact:
            base = dict(module.get_base_layer().named_parameters())
            yield _same(full, base[name], parameter, types[full])
            continue
        step = 1 if rows is None else max(1, len(parameter) // EXPERTS)
        found, wanted = parameter.data[::step].double(), exact[name][::step]
        if found.shape != wanted.shape:
            yield TensorError(full, float("inf"), 0)
            continue
        added = (wanted - dict(module.get_base_layer().named_parameters())[name].data[::step].double()).abs()
        allowed = _half_ulp(found, types[full]) + ARITHMETIC * (found.abs() + added + added.max())
        yield _worst(full, found, wanted, allowed)


def _worst(name: str, found: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> TensorError:
    if found.shape != exact.shape:
        return TensorError(name, float("inf"), 0)
    worst = ((found - exact).abs() / allowed.abs().clamp_min(1e-45)).max()
    return TensorError(name, float(worst.nan_to_num(nan=float("inf"))), len(found))


def _half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    magnitude = values.abs().clamp_min(info.smallest_normal)
    half: torch.Tensor = torch.exp2(torch.floor(torch.log2(magnitude))) * (info.eps / 2)
    return half
