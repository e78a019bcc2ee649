"""What the weights of an exported graph are compared with, and how far each may deviate."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export.sentence_modules import weight_files
from lora_export.validation.graphs.calibrated import Sums, calibrated_error, rows_of, searched_error, sums
from lora_export.validation.graphs.moments import Moments
from lora_export.validation.graphs.weights import Held, Quantized
from lora_export.validation.reference import streaming
from lora_export.validation.reference.probes import base_layer, plain_parameters, wrapped_modules
from lora_export.validation.reference.renamed import names_in
from lora_export.validation.reference.whole import BLOCK, effective_blocks, whole_probes, wrapped_parameters

# How far a number may be from the one that it stands for, in steps of its block: at most, and as a root mean
# square. A symmetric block has a step of 1/2^(bits-1) of its largest number, which may be cut off at the other end;
# a searched scale cuts off a little more. Uniform errors have a root mean square of 1/√12 = 0.29 steps.
STEPS, RMS_STEPS = 1.25, 0.42
# The same for 4-bit types whose codes are not evenly spaced, as shares of the block's largest number: half the
# widest gap, and the root mean square for uniform numbers (0.054, 0.066), which are the worst case in practice.
CODE_GAPS = {"nf4": (0.153, 0.06), "fp4": (0.168, 0.08)}
ARITHMETIC = 2.0**-20  # of the largest weight: what asking a layer for its weights costs in fp32
SCALE_ROUNDING = 2.0**-8  # a scale in bf16 moves every number of its block
GPTQ = "gptq"
ROWS = 4096  # of a tensor that are compared at once
Expected = Callable[[Held], torch.Tensor | None]


def numbers_of(folder: Path) -> Expected:
    """The values in a checkpoint's files, one piece at a time, in fp32."""
    places: dict[str, tuple[Path, str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            places |= {name: (file, name) for name in tensors.keys()}  # noqa: SIM118
    for path, file in weight_files(folder).items():
        with safe_open(file, framework="pt") as tensors:
            places |= {f"{path}.{name}": (file, name) for name in tensors.keys()}  # noqa: SIM118

    def read(held: Held) -> torch.Tensor | None:
        if held.tensor not in places:
            return None
        file, name = places[held.tensor]
        with safe_open(file, framework="pt") as tensors:
            view = tensors.get_slice(name)
            rows = view[held.start : held.stop] if view.get_shape() else tensors.get_tensor(name)
        return rows.float().reshape(held.values.shape)  # type: ignore[no-any-return]

    return read


def base_numbers(unmerged: Any) -> Expected:
    """The base's parameters inside PEFT's wrappers, for those that are a tensor of the files."""
    parameters = of_base(unmerged)
    name_of = names_in(unmerged.base_model.model, parameters)

    def read(held: Held) -> torch.Tensor | None:
        parameter = parameters.get(name_of(held.tensor))
        if parameter is None:
            return None
        with streaming.present(parameter):
            rows = parameter.data if not parameter.dim() else parameter.data[held.start : held.stop]
            fits = rows.numel() == held.values.numel()
            return rows.float().reshape(held.values.shape) if fits else None

    return read


def effective_numbers(unmerged: Any) -> Expected:
    """The effective weights of PEFT's unmerged modules, computed by the modules in fp32; the base's for others."""
    model = unmerged.base_model.model
    wrapped = wrapped_modules(model)
    saved, plain_numbers = saved_whole(unmerged), base_numbers(unmerged)
    name_of = names_in(model, of_base(unmerged))

    @functools.lru_cache(maxsize=1)
    def of(path: str) -> dict[str, torch.Tensor]:
        module = wrapped[path]
        with streaming.present(module):
            if hasattr(module, "parameter_name"):
                names = wrapped_parameters(module)
                return {
                    f"{path}.{n}": torch.cat([b.float() for *_, b in effective_blocks(module, n)]) for n in names
                }
            return {f"{path}.weight": _effective_weight(module)}

    def read(held: Held) -> torch.Tensor | None:
        name = name_of(held.tensor)
        path = next((p for p in wrapped if name.startswith(f"{p}.")), None)
        known = saved if name in saved else of(path) if path else {}
        if name not in known:
            return plain_numbers(held)
        with streaming.present(known[name]):
            return known[name][held.start : held.stop].float().reshape(held.values.shape).clone()

    return read


@torch.no_grad()
def _effective_weight(module: Any) -> torch.Tensor:
    """In the layer's own orientation; NaN for a layer whose weight cannot be computed."""
    layer = base_layer(module)
    if not isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
        return torch.full_like(layer.weight, float("nan"))
    exact = copy.deepcopy(module).double()
    blocks = whole_probes(exact)
    if isinstance(layer, nn.Embedding):
        return torch.cat([exact(ids) for ids in blocks or ()]).float()
    width = layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]
    one_hot = blocks or iter(torch.split(torch.eye(width, dtype=torch.float64), BLOCK))
    bias = exact(torch.zeros(1, width, dtype=torch.float64))
    columns = torch.cat([exact(x) - bias for x in one_hot]).float()
    return columns if isinstance(layer, Conv1D) else columns.T.contiguous()


def judged(
    held: Held,
    wanted: torch.Tensor,
    stored: Mapping[str, torch.dtype] | None,
    moments: Moments | None,
    same: bool = False,
) -> tuple[float, Callable[[], Sums] | None]:
    """How far a piece is from `wanted`, relative to what is allowed (above 1, or NaN, is a fault), and of a
    quantized one what it loses, computed when it is asked for.

    stored: None if the graph was made of exactly the `wanted` values, else the types that they were first rounded
    to; moments: of the calibration texts, None without any; same: the piece is `wanted`, bit for bit.
    """
    if held.quantized is None:
        if same and not held.plus and is_finite(wanted):
            return 0.0, None
        error = _cast_error(held, wanted) if stored is None else _rounding_error(held, wanted, _type(held, stored))
        return error, None
    how = held.quantized
    seen = wanted if stored is None else wanted.to(_type(held, stored)).float()
    values, exact = rows_of(held, seen.to(held.dtype), how)  # quantizers meet the numbers in the graph's type
    if how.algorithm != GPTQ:
        return _block_error(held.values, wanted, how), partial(sums, values, exact, None)
    moment = None if moments is None else moments.of(how.first)
    if moment is not None:
        error = calibrated_error(values, exact, how, held.dtype, moment)
    else:
        narrow = torch.bfloat16 in (held.dtype, *([] if stored is None else [_type(held, stored)]))
        error = searched_error(values, exact, how, held.dtype, narrow)
    fits = moment is None or len(moment) == exact.shape[1]
    return error, partial(sums, values, exact, moment if fits else None)


def is_finite(values: torch.Tensor) -> bool:
    """Without a copy of as many truth values."""
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def _type(held: Held, stored: Mapping[str, torch.dtype]) -> torch.dtype:
    coarsest = max(stored.values(), key=lambda d: torch.finfo(d).eps)
    return stored.get(held.tensor, coarsest)


def _cast_error(held: Held, wanted: torch.Tensor) -> float:
    """0 if every value is the nearest of its type, else infinity."""
    for values, exact in _rows(held.values, wanted):
        cast = (exact + held.plus).to(held.dtype).float() - held.plus
        if not torch.equal(cast, values):
            return float("inf")
    return 0.0


def _rounding_error(held: Held, wanted: torch.Tensor, stored: torch.dtype) -> float:
    """Relative to two roundings, to the checkpoint's type and to the graph's, and to fp32 arithmetic."""
    if not wanted.numel():
        return 0.0
    eps = sum(torch.finfo(d).eps / 2 for d in (stored, held.dtype))
    smallest = max(torch.finfo(d).tiny * torch.finfo(d).eps for d in (stored, held.dtype))
    largest = torch.stack(wanted.aminmax()).abs().max() + abs(held.plus)
    worst = []
    for values, exact in _rows(held.values, wanted):
        allowed = eps * (exact.abs() + abs(held.plus)) + ARITHMETIC * largest + smallest
        worst.append(((values - exact).abs() / allowed).max())
    return float(torch.stack(worst).max())


def _rows(*values: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Blocks of rows, so that no copy of an embedding is made. All have one shape."""
    return zip(*(torch.split(x, ROWS) if x.dim() else (x,) for x in values), strict=True)


def _block_error(values: torch.Tensor, wanted: torch.Tensor, how: Quantized) -> float:
    """The error of quantized matrices relative to what correct quantization may do: at worst, and overall."""
    values, wanted = (x.reshape(-1, how.width) for x in (values, wanted))
    if how.axis == 0:
        values, wanted = values.T, wanted.T
    if how.method in CODE_GAPS:
        values, wanted = values.reshape(1, -1), wanted.reshape(1, -1)
    missing = -wanted.shape[1] % how.block_size
    blocks, exact = (nn.functional.pad(x, (0, missing)).reshape(-1, how.block_size) for x in (values, wanted))
    largest = exact.abs().amax(1)
    if how.method in CODE_GAPS:
        # bitsandbytes' blocks run on across rows, so that a piece of a stacked matrix may begin within one.
        largest = nn.functional.max_pool1d(largest[None], 3, stride=1, padding=1)[0]
        most, typical = CODE_GAPS[how.method]
        step = largest
    else:
        bits = int(how.method.removeprefix("int"))
        spread = exact.amax(1).clamp_min(0) - exact.amin(1).clamp_max(0)
        step = largest / 2 ** (bits - 1) if how.symmetric else spread / (2**bits - 1)
        most, typical = STEPS, RMS_STEPS
    error = (blocks - exact).abs()
    worst = (error.amax(1) / (most * step + SCALE_ROUNDING * largest).clamp_min(1e-30)).max()
    used = largest > 0
    rounding = (typical * step + SCALE_ROUNDING * largest)[used, None]
    overall = (error[used] / rounding).square().mean().sqrt() if used.any() else worst
    return float(torch.maximum(worst, overall))


def of_base(unmerged: Any) -> dict[str, torch.Tensor]:
    """Plain name → parameter or buffer of the base inside PEFT's wrappers."""
    base = unmerged.base_model.model
    named = (*base.named_parameters(remove_duplicate=False), *base.named_buffers())
    return {n.replace(".base_layer", "").replace(".original_module", ""): v for n, v in named}


def saved_whole(unmerged: Any) -> dict[str, torch.Tensor]:
    """Plain name → parameter that no adapter kind computes: of modules saved whole, and the rest."""
    model = unmerged.base_model.model
    return dict(plain_parameters(model, wrapped_modules(model)))
