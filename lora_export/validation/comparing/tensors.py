"""Every tensor of the merged model against what PEFT's unmerged modules compute in float64.

Model outputs cannot show a fine fault (one projection scaled by 1.02 hides in bf16 rounding); tensors can.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_export.contracts import Check
from lora_export.validation.comparing.thresholds import tensor_checks
from lora_export.validation.reference.mended import kind_of
from lora_export.validation.reference.probes import (
    Probe,
    answers,
    attention_in_effect,
    generator_of,
    is_attention,
    make_probe,
    plain_buffers,
    plain_parameters,
    random_signs,
    saved_whole,
    wrapped_modules,
)
from lora_export.validation.reference.streaming import present
from lora_export.validation.reference.whole import effective_blocks, low_rank, whole_probes, wrapped_parameters

ARITHMETIC = 2.0**-22  # of |W|: what fp32 additions may lose
DEVIATIONS = 4.0  # times the fp32 error of the unmerged module itself
# PEFT takes the residual of PiSSA and OLoRA out of the base by an fp32 decomposition: an error of this share of the
# largest weight, everywhere.
RECOMPUTED = 2.0**-20
_IN_FP32 = frozenset({"DEFT"})  # which PEFT computes in fp32 whatever the model's type is
BLOCK = 4096  # rows of an untouched tensor that are compared at once
COMBINATIONS = 16  # random ones, of the elements of a row
SAMPLE = 64  # inputs on which the fp32 error of a layer is measured that is compared whole anyway


@dataclass(frozen=True)
class TensorError:
    """worst: the largest |merged − exact| in units of what rounding explains; above 1 is a fault."""

    name: str
    worst: float
    rows: int


def compare_tensors(
    unmerged: Any,
    merged: nn.Module,
    dtypes: Mapping[str, torch.dtype],
    rows: int | None,
    only: Collection[str] | None = None,
    *,
    seed: int = 0,
) -> list[TensorError]:
    """One entry for each tensor, parameters and stored buffers.

    rows: how many columns or rows are compared one by one of what is too dear to be recomputed whole (None: all);
    seed: decides which. only: the modules that are of interest, by path (None: all); a tensor's entry depends on no
    other module.
    """
    model = unmerged.base_model.model
    parameters = dict(merged.named_parameters(remove_duplicate=False))
    types = {n: dtypes.get(n) or dtypes[_first_name(merged, p)] for n, p in parameters.items()}
    buffers = dict(merged.named_buffers())
    wrapped = wrapped_modules(model)
    everywhere = RECOMPUTED if _recomputed(unmerged) else 0.0
    errors: dict[str, TensorError] = {}
    for name, exact in plain_parameters(model, wrapped):
        if only is not None and name.rpartition(".")[0] not in only:
            continue
        with present(exact, parameters.get(name)):
            errors[name] = _same(name, exact, parameters.get(name), types.get(name))
    for path, module in wrapped.items():
        if only is not None and path not in only:
            continue
        with present(module, _submodule(merged, path)):
            for error in _wrapped(path, module, merged, types, rows, everywhere, seed):
                errors.setdefault(error.name, error)
    for name, exact in plain_buffers(model, wrapped):
        if only is None or name.rpartition(".")[0] in only:
            errors[name] = _same_buffer(name, exact, buffers.get(name), dtypes.get(name))
    for name in parameters.keys() - errors.keys() if only is None else ():
        errors[name] = TensorError(name, float("inf"), 0)
    return list(errors.values())


def verdict(errors: Sequence[TensorError], seed: int = 0) -> tuple[tuple[str, ...], list[Check]]:
    """(the tensors beyond what rounding explains, worst first; the checks that say so). seed: of the samples."""
    faulty = sorted((e for e in errors if not e.worst <= 1), key=lambda e: -e.worst)
    worst = max((e.worst for e in errors), default=0.0)
    # JSON has no infinity; a tensor that differs where nothing may is reported as the largest float.
    checks = tensor_checks(min(worst, 1.7e308), len(faulty), len(errors))
    checks[0] = replace(checks[0], note=f"{checks[0].note}; samples are drawn with seed {seed}")
    return tuple(e.name for e in faulty), checks


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _first_name(model: nn.Module, parameter: torch.Tensor) -> str:
    return next(n for n, p in model.named_parameters() if p is parameter)


def _recomputed(unmerged: Any) -> bool:
    if any(kind_of(c) in _IN_FP32 for c in unmerged.peft_config.values()):
        return True
    inits = (getattr(c, "init_lora_weights", True) for c in unmerged.peft_config.values())
    return any(isinstance(i, str) and i.lower() in ("pissa", "olora") for i in inits)


def _same(name: str, exact: torch.Tensor, actual: torch.Tensor | None, dtype: torch.dtype | None) -> TensorError:
    """Nothing was added to this tensor, so nothing but the rounding to its type may differ."""
    if actual is None or dtype is None or actual.shape != exact.shape:
        return TensorError(name, float("inf"), 0)
    # In blocks of rows: an embedding is the largest tensor of many models, and a copy of it as large again.
    blocks = [slice(i, i + BLOCK) for i in range(0, len(exact), BLOCK)] if exact.dim() else [...]
    equal = all(torch.equal(exact.data[b].to(dtype).float(), actual.data[b]) for b in blocks)
    return TensorError(name, 0.0 if equal else float("inf"), exact.shape[0] if exact.dim() else 1)


def _same_buffer(
    name: str, exact: torch.Tensor, actual: torch.Tensor | None, dtype: torch.dtype | None
) -> TensorError:
    if exact.is_floating_point():
        return _same(name, exact, actual, dtype)
    return TensorError(name, 0.0 if actual is not None and torch.equal(exact, actual) else float("inf"), 1)


def _wrapped(
    path: str,
    module: Any,
    merged: nn.Module,
    types: Mapping[str, torch.dtype],
    rows: int | None,
    everywhere: float,
    seed: int,
) -> Iterator[TensorError]:
    plain: Any = _submodule(merged, path)
    if plain is None:
        yield TensorError(path, float("inf"), 0)
        return
    if saved_whole(module) is not None:
        return
    if is_attention(module):
        for name, values in attention_in_effect(module).items():
            actual = plain.get_parameter(name)
            yield _stacked(f"{path}.{name}", actual, [(slice(None), *values)], types[f"{path}.{name}"])
        return
    if hasattr(module, "parameter_name"):
        yield from _parameters(path, module, plain, types)
        return
    generator = generator_of(seed, path)
    probe = make_probe(module, min(rows or SAMPLE, SAMPLE) if low_rank(module) else rows, generator)
    if probe is None:
        yield TensorError(f"{path}.weight", float("inf"), 0)
    else:
        yield from _layer(path, module, plain, types, probe, everywhere, generator)


def _layer(
    path: str,
    module: Any,
    plain: Any,
    types: Mapping[str, torch.dtype],
    probe: Probe,
    everywhere: float,
    generator: torch.Generator,
) -> Iterator[TensorError]:
    """The merged layer gets the same probes, and a copy whose weights are the allowed errors gives the bound.

    The probe is a sample: every element is asked for after it, or takes part in combinations of random signs.
    """
    exact = copy.deepcopy(module).double()
    wanted, deviation = answers(module, exact, probe.inputs)
    bound, actual = (copy.deepcopy(plain).double() for _ in range(2))
    for name, parameter in bound.named_parameters():
        dtype = types[f"{path}.{name}"]
        size = parameter.data.abs()
        arithmetic = ARITHMETIC * size + everywhere * size.max() + DEVIATIONS * deviation
        parameter.data = half_ulp(parameter.data, dtype) + arithmetic
    weight = f"{path}.weight"
    with torch.no_grad():
        errors = [_worst(weight, actual(probe.inputs), wanted, bound(probe.inputs))]
        if probe.zeros is not None and getattr(plain, "bias", None) is not None:
            yield _worst(f"{path}.bias", actual(probe.zeros), exact(probe.zeros), bound(probe.zeros))
        one_by_one = whole_probes(exact, actual, bound)
        if one_by_one is None:
            errors.append(_combined(weight, exact, actual, bound, generator))
        else:
            errors += [_worst(weight, actual(x), exact(x), bound(x)) for x in one_by_one]
        yield max(errors, key=lambda e: e.worst)


def _combined(
    name: str, exact: Any, actual: nn.Module, bound: nn.Module, generator: torch.Generator
) -> TensorError:
    """All elements of a row together, in random combinations: for what is too dear to compare one by one.

    Of a sum with random signs the mean square is the sum of the squared errors, which rounding keeps below the sum
    of the squared bounds (a third of it, if errors are uniform). Twice that is allowed, so that no chance of the
    signs raises an alarm: with COMBINATIONS draws, one in 10¹² rows would.
    """
    signs = random_signs(exact, COMBINATIONS, generator)
    square = copy.deepcopy(bound)
    for parameter in square.parameters():
        parameter.data = parameter.data.square()
    error = (actual(signs) - exact(signs)).square().mean(0)
    allowed = 2 * square(signs[:1].square())[0]
    return _worst(name, (error / allowed.clamp_min(1e-90)).sqrt(), torch.zeros_like(error), torch.ones_like(error))


def _parameters(path: str, module: Any, plain: Any, types: Mapping[str, torch.dtype]) -> Iterator[TensorError]:
    changed, base = wrapped_parameters(module), dict(module.get_base_layer().named_parameters())
    for name, parameter in plain.named_parameters():
        full = f"{path}.{name}"
        if name not in changed:
            yield _same(full, base[name], parameter, types[full])
        elif parameter.shape != base[name].shape:
            yield TensorError(full, float("inf"), 0)
        else:
            yield _stacked(full, parameter, effective_blocks(module, name), types[full])


def _stacked(
    name: str,
    parameter: torch.Tensor,
    blocks: Iterable[tuple[slice, torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
) -> TensorError:
    """The worst of all blocks, which are (where, the base's values, the wanted ones)."""
    worst = 0.0
    for where, base, wanted in blocks:
        actual, added = parameter.data[where].double(), (wanted - base).abs()
        allowed = half_ulp(actual, dtype) + ARITHMETIC * (actual.abs() + added + added.max())
        worst = max(worst, _worst(name, actual, wanted, allowed).worst)
    return TensorError(name, worst, len(parameter))


def _worst(name: str, actual: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> TensorError:
    if actual.shape != exact.shape:
        return TensorError(name, float("inf"), 0)
    worst = ((actual - exact).abs() / allowed.abs().clamp_min(1e-45)).max()
    return TensorError(name, float(worst.nan_to_num(nan=float("inf"))), len(actual))


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    magnitude = values.abs().clamp_min(info.smallest_normal)
    half: torch.Tensor = torch.exp2(torch.floor(torch.log2(magnitude))) * (info.eps / 2)
    return half
