"""Every tensor of the merged model, recomputed in float64 from the base and the adapter, and compared.

Model outputs cannot show a fine fault (one projection scaled by 1.02 hides in bf16 rounding); tensors can.
What is expected is taken from PEFT's modules, so neither names nor formulas are shared with merge/.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

SEED = 20_240_501


@dataclass(frozen=True)
class TensorError:
    """worst: the largest |merged − exact| in units of what rounding explains; above 1 is a fault."""

    name: str
    worst: float
    rows: int


def compare_tensors(
    unmerged: Any, merged: torch.nn.Module, dtypes: Mapping[str, torch.dtype], rows: int | None
) -> list[TensorError]:
    """One entry for each parameter of the merged model. rows: how many of an updated one (None: all)."""
    found = dict(merged.named_parameters())
    expected = dict(_expected(unmerged))
    # A head that the merge untied has a parameter of its own; in the tied model it is the embedding.
    tied = _tied(unmerged)
    errors = []
    for name, value in found.items():
        parts = expected.get(name) or expected.get(tied.get(name, ""))
        if parts is None:
            errors.append(TensorError(name, float("inf"), 0))
            continue
        errors.append(_compare(name, value, parts, dtypes[name], rows))
    return errors


@dataclass(frozen=True)
class Parts:
    """weight (n, …) and what is added to it: scaling, left (n, r), right (r, m)."""

    weight: torch.Tensor
    deltas: tuple[tuple[float, torch.Tensor, torch.Tensor], ...] = ()


def _compare(name: str, value: torch.Tensor, parts: Parts, dtype: torch.dtype, rows: int | None) -> TensorError:
    if value.shape != parts.weight.shape:
        return TensorError(name, float("inf"), 0)
    count = value.shape[0] if value.dim() else 1
    if not parts.deltas:
        exact = parts.weight.to(dtype).float()  # nothing was added, so nothing but rounding may differ
        return TensorError(name, 0.0 if torch.equal(exact, value) else float("inf"), count)
    picked = _pick(count, rows)
    weight = parts.weight[picked].double()
    exact, bound = weight.clone(), weight.abs()
    for scaling, left, right in parts.deltas:
        a, b = left[picked].double(), right.double()
        exact += scaling * (a @ b)
        bound += abs(scaling) * (a.abs() @ b.abs())
    # Half a unit in the last place of the output type, and what fp32 arithmetic may lose on the way.
    allowed = _half_ulp(exact, dtype) + 2.0**-22 * bound
    worst = ((value[picked].double() - exact).abs() / allowed.clamp_min(1e-45)).max()
    return TensorError(name, float(worst.nan_to_num(nan=float("inf"))), len(picked))


def _pick(count: int, rows: int | None) -> torch.Tensor:
    if rows is None or rows >= count:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(SEED)
    picked = torch.randperm(count, generator=generator)[: max(rows - 2, 0)]
    return torch.tensor(sorted({0, count - 1, *picked.tolist()}))


def _half_ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    magnitude = exact.abs().clamp_min(info.smallest_normal)
    half: torch.Tensor = torch.exp2(torch.floor(torch.log2(magnitude))) * (info.eps / 2)
    return half


def _expected(unmerged: Any) -> Iterator[tuple[str, Parts]]:
    """(name in the plain model, what it must be) for every parameter of PEFT's unmerged model."""
    from peft.tuners.lora import LoraLayer

    model = unmerged.base_model.model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    active = list(unmerged.base_model.active_adapters)
    for name, parameter in model.named_parameters():
        if any(f".{part}" in name for part in ("lora_", "original_module")):
            continue
        plain, module = _plain_name(name, active), name.partition(".base_layer.")[0]
        layer = layers.get(module) if ".base_layer." in name else None
        if layer is None or "base_layer.base_layer" in name:
            yield plain, Parts(parameter.data)
        elif name.endswith(".weight"):
            yield plain, Parts(parameter.data, tuple(_deltas(layer, active)))
        else:
            yield plain, Parts(parameter.data, tuple(_bias_deltas(layer, active)))


def _plain_name(name: str, active: list[str]) -> str:
    plain = name.replace(".base_layer", "")
    for adapter in active:
        plain = plain.replace(f".modules_to_save.{adapter}", "")
    return plain


def _deltas(layer: Any, active: list[str]) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    for adapter in active:
        if adapter in layer.lora_A:
            left, right = layer.lora_B[adapter].weight.data, layer.lora_A[adapter].weight.data
            flip = layer.fan_in_fan_out
        elif adapter in layer.lora_embedding_A:
            left, right = layer.lora_embedding_B[adapter].data, layer.lora_embedding_A[adapter].data
            flip = True
        else:
            continue
        scaling = float(layer.scaling[adapter])
        yield (scaling, right.T, left.T) if flip else (scaling, left, right)


def _bias_deltas(layer: Any, active: list[str]) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """lora_bias: bias + scaling · addend, written as a product of (n, 1) and (1,) so that one formula serves."""
    for adapter in active:
        if adapter in layer.lora_B and layer.lora_B[adapter].bias is not None:
            yield float(layer.scaling[adapter]), layer.lora_B[adapter].bias.data[:, None], torch.ones(1)


def _tied(unmerged: Any) -> dict[str, str]:
    """Output head → input embedding, by the names that the plain model gives them."""
    model = unmerged.base_model.model
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return {str(k).replace(".base_layer", ""): str(v).replace(".base_layer", "") for k, v in keys.items()}
