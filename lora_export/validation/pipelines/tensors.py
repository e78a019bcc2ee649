"""Every stored tensor of a component: what adapters change is recomputed in float64, the rest is the base's."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lora_export.contracts import Check, Pipeline
from lora_export.storage.sealed import read_json
from lora_export.validation.comparing.tensors import (
    ARITHMETIC,
    COMBINATIONS,
    DEVIATIONS,
    TensorError,
    half_ulp,
    verdict,
)
from lora_export.validation.folder.stored import listed, same_values
from lora_export.validation.pipelines.activations import CONVOLUTIONS, Adapted, axis_of
from lora_export.validation.pipelines.injecting import Changes
from lora_export.validation.pipelines.probing import (
    by_inputs,
    columns,
    constant,
    in_double,
    responses,
    some_columns,
    width_of,
)
from lora_export.validation.pipelines.vectors import Vectors
from lora_export.validation.reference.files import FLOATS, Stored
from lora_export.validation.reference.probes import generator_of
from lora_export.validation.reference.whole import without_geometry

MOST = 2.0**34  # multiplications for one tensor; beyond it a sample of its columns stands for the others
_WORDS = ("vocab_size", "eos_token_id")
SAMPLE = 64  # one-hot inputs on which the fp32 error of a layer is measured


def tensor_checks(
    changes: Changes,
    parameters: Mapping[str, torch.Tensor],
    base: Mapping[str, Stored],
    merged: Mapping[str, Stored],
    name: str,
    vectors: Vectors,
    rows: int | None,
    dtype: str,
    seed: int,
) -> tuple[tuple[str, ...], list[Check]]:
    """(tensors that are not what the adapters make of the base, worst first; the checks of a component).

    changes: of the base's model in fp32; parameters: the model's own that no module owns; base, merged: stored
    tensors by name; name: of the component; vectors: of textual inversion; dtype: of --dtype.
    """
    errors = list(_errors(changes, parameters, merged, rows, seed))
    faulty, checks = verdict(errors, seed)
    different = list(_differences(changes, base, merged, vectors, dtype))
    note = "tensors that no adapter touches are the base's, bit for bit, and none is missing or in excess"
    note += "" if dtype == "keep" else f"; all are converted to {dtype}"
    stored = Check("stored_tensors_differ", len(different), 0, not different, listed(different) or note)
    checks = [*checks, stored] if changes.names else [stored]
    own = [Check(f"{name}_{c.name}", c.value, c.threshold, c.passed, c.note) for c in checks]
    return tuple(f"{name}: {n}" for n in faulty), own


def _differences(
    changes: Changes, base: Mapping[str, Stored], merged: Mapping[str, Stored], vectors: Vectors, dtype: str
) -> Iterator[str]:
    yield from (f"{name}: missing" for name in sorted(base.keys() - merged.keys()))
    yield from (f"{name}: the base has no such tensor" for name in sorted(merged.keys() - base.keys()))
    for name in sorted(base.keys() & merged.keys()):
        old, new = base[name], merged[name]
        kept = dtype == "keep" or old.dtype not in FLOATS
        wanted = old.dtype if kept else next(n for n, t in FLOATS.items() if str(t) == f"torch.{dtype}")
        if new.dtype != wanted:
            yield f"{name}: stored as {new.dtype}, should be {wanted}"
        elif vectors.takes(name) and name not in changes.names:
            yield from vectors.differences(name, old, new)
        elif old.shape != new.shape:
            yield f"{name}: its shape is {list(new.shape)}, the base's is {list(old.shape)}"
        elif name not in changes.names and not same_values(old, new):
            yield f"{name}: no adapter touches it, and it is not the base's"


def _errors(
    changes: Changes,
    parameters: Mapping[str, torch.Tensor],
    merged: Mapping[str, Stored],
    rows: int | None,
    seed: int,
) -> Iterator[TensorError]:
    stored: dict[str, dict[str, tuple[str, Stored]]] = {}
    for name, (path, parameter) in changes.names.items():
        if name not in merged:
            yield TensorError(name, float("inf"), 0)
        elif path:
            stored.setdefault(path, {})[parameter] = (name, merged[name])
        else:
            wanted = parameters[name].double() + changes.parameters[name].double()
            yield _plain(name, wanted, changes.parameters[name], merged[name])
    for path, given in stored.items():
        layer = changes.layers[path]
        misfit = [n for p, (n, s) in given.items() if s.shape != layer.base_layer.get_parameter(p).shape]
        yield from (TensorError(name, float("inf"), 0) for name in misfit)
        if not misfit:
            yield from compare_layer(layer, given, rows, generator_of(seed, path))


def compare_layer(
    layer: Adapted, merged: Mapping[str, tuple[str, Stored]], rows: int | None, generator: torch.Generator
) -> Iterator[TensorError]:
    """merged: the tensors of the merged layer, parameter → (name, stored)."""
    kept = {p: s.read().double() for p, (_, s) in merged.items()}
    types = {p: FLOATS[s.dtype] for p, (_, s) in merged.items()}
    names = {p: name for p, (name, _) in merged.items()}
    if isinstance(layer.base_layer, nn.Linear | nn.Embedding | CONVOLUTIONS):
        yield from _of_columns(layer, kept, types, names, rows, generator)
    else:
        yield from _of_norm(layer, kept, types, names, generator)


@torch.no_grad()
def _of_columns(
    layer: Adapted,
    kept: Mapping[str, torch.Tensor],
    types: Mapping[str, torch.dtype],
    names: Mapping[str, str],
    rows: int | None,
    generator: torch.Generator,
) -> Iterator[TensorError]:
    exact = in_double(layer)
    base: Any = exact.base_layer
    width = width_of(base)
    picked = torch.randperm(width, generator=generator)[: rows or width]
    if "weight" in kept:
        weight = kept["weight"]
        allowed = half_ulp(weight, types["weight"]) + ARITHMETIC * weight.abs()
        allowed += DEVIATIONS * _deviation(layer, exact, picked[:SAMPLE])
        actual, bound = (by_inputs(base, values) for values in (weight, allowed))
        worst = [_ratio(wanted, actual[at], bound[at]) for at, wanted in columns(exact, MOST)]
        if not worst:
            wanted = some_columns(exact, picked)
            worst = [_ratio(wanted, actual[picked], bound[picked]), _combined(exact, actual, bound, generator)]
        yield TensorError(names["weight"], max(worst), len(weight))
    if "bias" in kept:
        wanted, bias = constant(exact), kept["bias"]
        bound = half_ulp(bias, types["bias"]) + ARITHMETIC * (bias.abs() + wanted.abs())
        yield TensorError(names["bias"], _ratio(wanted, bias, bound), len(bias))


def _deviation(layer: Adapted, exact: Adapted, picked: torch.Tensor) -> float:
    """How far the unmerged layer's own fp32 arithmetic is from float64, on some of its columns."""
    narrow = copy.deepcopy(layer)
    if isinstance(layer.base_layer, nn.Embedding):
        return float((narrow(picked).double() - exact(picked)).abs().max())
    if isinstance(layer.base_layer, CONVOLUTIONS):
        without_geometry(narrow)
    one_hot = torch.zeros(len(picked), width_of(layer.base_layer), dtype=torch.float64)
    one_hot[torch.arange(len(picked)), picked] = 1
    return float((responses(narrow, one_hot.float()).double() - responses(exact, one_hot)).abs().max())


def _combined(exact: Adapted, actual: torch.Tensor, bound: torch.Tensor, generator: torch.Generator) -> float:
    """All elements of a row together, in random combinations, as in comparing/tensors.py: twice the sum of the
    squared bounds is allowed for the mean square."""
    signs = torch.randint(0, 2, (COMBINATIONS, len(actual)), generator=generator).double() * 2 - 1
    error = (signs @ actual - responses(exact, signs)).square().mean(0)
    return _ratio((error / (2 * bound.square().sum(0)).clamp_min(1e-90)).sqrt(), 0, torch.ones(()))


@torch.no_grad()
def _of_norm(
    layer: Adapted,
    kept: Mapping[str, torch.Tensor],
    types: Mapping[str, torch.dtype],
    names: Mapping[str, str],
    generator: torch.Generator,
) -> Iterator[TensorError]:
    """A norm multiplies what it normalizes: its answers to random inputs are compared, channel by channel."""
    exact = copy.deepcopy(layer).double()
    base: Any = exact.base_layer
    axis = axis_of(base)
    channels = len(base.weight)
    shape = (SAMPLE, channels, 2) if axis == 1 else (SAMPLE, channels)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    none = {n: torch.zeros_like(p) for n, p in base.named_parameters()}
    normal = functional_call(base, {**none, "weight": torch.ones_like(base.weight)}, (inputs,)).abs()
    narrow = copy.deepcopy(layer)(inputs.float()).double()
    wanted = exact(inputs)
    actual = functional_call(base, {**dict(base.named_parameters()), **kept}, (inputs,))
    allowed = DEVIATIONS * (narrow - wanted).abs().max() + ARITHMETIC * wanted.abs()
    for parameter, values in kept.items():
        each = half_ulp(values, types[parameter]).reshape(-1, *[1] * (axis == 1))
        allowed = allowed + each * (normal if parameter == "weight" else 1.0)
    worst = _ratio(wanted, actual, allowed)
    yield from (TensorError(name, worst, channels) for name in names.values())


def _plain(name: str, wanted: torch.Tensor, added: torch.Tensor, stored: Stored) -> TensorError:
    actual = stored.read().double()
    if actual.shape != wanted.shape:
        return TensorError(name, float("inf"), 0)
    allowed = half_ulp(actual, FLOATS[stored.dtype]) + ARITHMETIC * (actual.abs() + added.abs().max())
    return TensorError(name, _ratio(wanted, actual, allowed), len(actual))


def _ratio(wanted: torch.Tensor, actual: torch.Tensor | float, allowed: torch.Tensor) -> float:
    """The largest error in units of what is allowed; infinite for what is no number."""
    worst = ((actual - wanted).abs() / allowed.clamp_min(1e-45)).max()
    return float(worst.nan_to_num(nan=float("inf")))


def files_check(base: Pipeline, merged: Pipeline, tokenizers: bool) -> Check:
    """What is no weight of a component: the pipeline's index, configurations, scheduler and tokenizers, byte for
    byte. tokenizers: whether an adapter adds tokens, so that these differ."""
    different = []
    for file in sorted(p for p in base.folder.rglob("*") if p.is_file()):
        name = file.relative_to(base.folder)
        top = name.parts[0]
        if not (len(name.parts) == 1 or top in base.components or top in base.others):
            continue
        if file.suffix not in (".json", ".txt", ".model") or ".index." in file.name:
            continue
        if tokenizers and top.startswith("tokenizer"):
            continue
        other = merged.folder / name
        grown = tokenizers and top.startswith("text_encoder") and file.name == "config.json"
        if not other.is_file():
            different.append(f"{name}: missing")
        elif not (_same_but_words(file, other) if grown else other.read_bytes() == file.read_bytes()):
            different.append(f"{name}: not the base's")
    note = "the index, configurations, scheduler and tokenizers are the base's, byte for byte"
    return Check("pipeline_files_differ", len(different), 0, not different, listed(different) or note)


def _same_but_words(file: Path, other: Path) -> bool:
    """What new tokens change in a text encoder's configuration."""
    own, theirs = ({k: v for k, v in read_json(p).items() if k not in _WORDS} for p in (file, other))
    return own == theirs
