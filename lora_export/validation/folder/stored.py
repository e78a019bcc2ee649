"""The tensors of the merged files against the base's, without a model: untouched ones are the same, bit for bit.

transformers reads only the tensors that a model has a place for, and in one type; other programs read them all.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_export.contracts import Check, MergeOptions
from lora_export.storage.sealed import read_json
from lora_export.validation.reference.files import FLOATS, Stored, all_headers, headers
from lora_export.validation.reference.quantized import is_quantized, of_activations
from lora_export.validation.reference.trained import Trained

INDEX = "model.safetensors.index.json"
BLOCK = 2**22  # elements that are compared at once
SHOWN = 8  # names in the check's note
HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Changed:
    """modules: paths of what an adapter changes; tensors: names of what it holds whole; loaded: name in a file →
    name in the loaded model, where they differ; tied: names in that model that share one weight."""

    modules: Collection[str]
    tensors: Collection[str]
    loaded: Mapping[str, Sequence[str]]
    tied: Collection[frozenset[str]] = ()

    def holds(self, name: str) -> bool:
        """Whether a tensor of a file may differ. Either name may have a prefix that the other lacks."""
        loaded = self.loaded.get(name, (name,))
        return any(self._holds(n) for one in loaded for n in (one, *self.tied_to(one)))

    def tied_to(self, name: str) -> frozenset[str]:
        return next((group for group in self.tied if name in group), frozenset())

    def _holds(self, name: str) -> bool:
        if any(_same_end(name, other) for other in self.tensors):
            return True
        parts = name.split(".")
        owners = [".".join(parts[:i]) for i in range(1, len(parts))]
        return any(_same_end(owner, path) for owner in owners for path in self.modules)


def _same_end(a: str, b: str) -> bool:
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def tied_names(model: Any) -> list[frozenset[str]]:
    """Names of a model without weights that share one parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [frozenset(group) for group in names.values() if len(group) > 1]


def stored_check(
    base: Path,
    merged: Path,
    changed: Changed,
    options: MergeOptions,
    replicated: bool,
    trained: Trained | None = None,
) -> Check:
    """trained: the class of the merged model, where it is another than the base's."""
    different = list(dict.fromkeys(differences(base, merged, changed, options, replicated, trained)))
    note = "tensors that no adapter touches are the base's, bit for bit, and none is missing or in excess"
    note += "" if options.dtype == "keep" else f"; all are converted to {options.dtype}"
    return Check("stored_tensors_differ", len(different), 0, not different, listed(different) or note)


def listed(differences: Sequence[str]) -> str:
    """The first of them, and how many there are more; "" of none."""
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return "; ".join(differences[:SHOWN]) + more


def differences(
    base: Path,
    merged: Path,
    changed: Changed,
    options: MergeOptions,
    replicated: bool,
    trained: Trained | None = None,
) -> Iterator[str]:
    """replicated: the merged model has copies of layers, under names of their own: those are left to the model."""
    before, after = headers(base), headers(merged)
    yield from _twice(merged)
    yield from _not_as_indexed(merged, after)
    if not before:
        return  # the base is a GGUF file, which has other names; the loaded model tells
    quantized = is_quantized(base) or _codes_became_floats(before, after)
    if trained is not None:
        before = {new: before[old] for new, old in trained.renamed(before, after).items()}
        after = {name: tensor for name, tensor in after.items() if name not in trained.heads}
    if not replicated:
        yield from _names(before, after, quantized, changed)
    on_the_fly = options.training_quantization != "none" and options.base_weights == "dequantized"
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if replicated and _in_a_layer(name):
            continue
        if quantized and old.dtype not in FLOATS:
            continue  # dequantized: the loaded model tells
        yield from _one(name, old, new, changed, options.dtype, on_the_fly and len(old.shape) > 1)


def _codes_became_floats(before: Mapping[str, Stored], after: Mapping[str, Stored]) -> bool:
    """Whether the base is quantized without a word in its config.json."""
    codes = [n for n, t in before.items() if t.dtype not in FLOATS]
    return any(n not in after or after[n].dtype in FLOATS for n in codes)


def _one(name: str, old: Stored, new: Stored, changed: Changed, dtype: str, dequantized: bool) -> Iterator[str]:
    wanted = old.dtype if dtype == "keep" or old.dtype not in FLOATS else _header_type(dtype)
    if new.dtype != wanted:
        yield f"{name}: stored as {new.dtype}, should be {wanted}"
    elif changed.holds(name) or dequantized:
        return
    elif old.shape != new.shape and not _resized(old, new):
        yield f"{name}: its shape is {list(new.shape)}, the base's is {list(old.shape)}"
    elif old.shape == new.shape and not same_values(old, new):
        yield f"{name}: no adapter touches it, and it is not the base's"


def _header_type(dtype: str) -> str:
    return next(name for name, known in FLOATS.items() if str(known) == f"torch.{dtype}")


def _names(
    before: Mapping[str, Stored], after: Mapping[str, Stored], quantized: bool, changed: Changed
) -> Iterator[str]:
    """A quantized weight has several tensors in the base, whose names begin as its own does."""
    codes = {n for n, tensor in before.items() if tensor.dtype not in FLOATS}
    beginnings = {n.removesuffix("weight") for n in after if n.endswith("weight") or n not in before or n in codes}
    for name in sorted(before.keys() - after.keys()):
        if not quantized or not (of_activations(name) or any(name[:i] in beginnings for i in range(len(name)))):
            yield f"{name}: missing"
    for name in sorted(after.keys() - before.keys()):
        parts = quantized and any(n.startswith(name.removesuffix("weight")) for n in before)
        # What was tied and has its own weight now is compared with what PEFT computes.
        if not parts and not name.endswith(HEADS) and not changed.tied_to(name):
            yield f"{name}: neither the base nor an adapter has this tensor"


def _twice(merged: Path) -> Iterator[str]:
    seen: dict[str, Path] = {}
    for stored in all_headers(merged):
        if seen.setdefault(stored.name, stored.file) != stored.file:
            yield f"{stored.name}: in {seen[stored.name].name} and in {stored.file.name}"


def _not_as_indexed(merged: Path, after: Mapping[str, Stored]) -> Iterator[str]:
    if not (merged / INDEX).is_file():
        return
    places: Any = read_json(merged / INDEX).get("weight_map")
    places = places if isinstance(places, dict) else {}
    for name in sorted(places.keys() | after.keys()):
        if name not in after or places.get(name) != after[name].file.name:
            yield f"{name}: {INDEX} says that it is in {places.get(name, 'no file')}"


def _in_a_layer(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def same_values(old: Stored, new: Stored) -> bool:
    """Bit for bit, after the base's values were rounded to the type of the merged ones."""
    if not old.shape or not prod(old.shape):
        return _same_bits(old.read(), new.read())
    with safe_open(old.file, framework="pt") as a, safe_open(new.file, framework="pt") as b:
        left, right = a.get_slice(old.name), b.get_slice(new.name)
        rows = max(1, BLOCK // max(1, prod(old.shape[1:])))
        steps = range(0, old.shape[0], rows)
        return all(_same_bits(left[i : i + rows], right[i : i + rows]) for i in steps)


def _resized(old: Stored, new: Stored) -> bool:
    """Whether all that both have is the same, and the rest zeros: as transformers resizes final_logits_bias."""
    if len(old.shape) != len(new.shape) or old.shape == new.shape:
        return False
    left, right = old.read(), new.read()
    common = tuple(slice(0, min(x, y)) for x, y in zip(old.shape, new.shape, strict=True))
    same = _same_bits(left[common], right[common])
    right[common] = 0
    return same and not bool(right.any())


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a = a.to(b.dtype).contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
