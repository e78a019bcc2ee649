"""Adapters that PEFT itself cannot load, written as ones that it can: for the reference alone.

From each trainer's own formula, and without a line of merging/ or adapters/. mlx-lm (tuner/lora.py, dora.py):
y = W·x + scale·((x·lora_a)·lora_b); of an embedding W + scale·lora_a·lora_b; DoRA's m is divided by the norms of
the rows. Tinker and SGLang: matrices of experts stacked, and q, k and v of a linear attention apart, where the
model has one weight for them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_export.contracts import AdapterChoice
from lora_export.errors import AdapterError
from lora_export.validation.reference.files import Stored, adapter_config, all_headers
from lora_export.validation.reference.foreign_saved import SPLIT, STACK, Factors, Writer

Read = tuple[list[Factors], float, bool]  # scale; whether a tied head has its embedding's update


def as_peft(base: Path, adapters: Sequence[AdapterChoice], folder: Path) -> list[AdapterChoice]:
    """The same choices, each that PEFT cannot load replaced by one in `folder` that it can."""
    choices = []
    for i, choice in enumerate(adapters):
        read = _read(choice.folder)
        if read is not None:
            target = folder / f"as-peft-{i}"
            target.mkdir(parents=True)
            Writer(base, choice.folder, target, *read).write()
            choice = AdapterChoice(target, choice.weight)
        choices.append(choice)
    return choices


def _read(folder: Path) -> Read | None:
    """None for an adapter that PEFT loads. AdapterError for one that holds less than its trainer writes."""
    config = adapter_config(folder)
    try:
        return _mlx(folder, config) or _stacked(folder, config)
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError, OSError) as error:
        raise AdapterError(
            f"the adapter is incomplete: {error}",
            where=folder,
            expected="both matrices of each module, and the rank and scale of the training",
            next_step="lora-export inspect ADAPTER names the tensor",
        ) from error


def _mlx(folder: Path, config: Mapping[str, Any]) -> Read | None:
    parameters = config.get("lora_parameters")
    if "peft_type" in config or not isinstance(parameters, dict):
        return None
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in load_file(folder / "adapters.safetensors").items():
        module, _, leaf = name.rpartition(".")
        parts[module.replace("switch_mlp", "experts")][leaf] = value.double()
    factors: list[Factors] = []
    for module, held in parts.items():
        a, b, m = held["lora_a"], held["lora_b"], held.get("m")
        if b.dim() == 3:
            factors += [
                Factors(_expert(module, e), x, y)
                for e, (x, y) in enumerate(zip(a.reshape(len(b), -1, a.shape[-1]), b, strict=True))
            ]
        elif module.endswith(("embed_tokens", "wte", "word_embeddings", "embed_in")):
            factors.append(Factors(module, b, a, m))
        else:
            factors.append(Factors(module, a.T, b.T, m))
    return factors, float(parameters["scale"]), True


def _stacked(folder: Path, config: Mapping[str, Any]) -> Read | None:
    """None unless the file holds what PEFT has no layer for."""
    stored = list(all_headers(folder))
    stored = [s for s in stored if s.file.name.startswith("adapter_model")] or [
        s for s in stored if s.file.name.startswith("model")
    ]
    if not any(map(_is_odd, stored)) or not all("lora_A" in s.name or "lora_B" in s.name for s in stored):
        return None
    tensors = {_plain(s.name): s.read().double() for s in stored}
    factors: list[Factors] = []
    for name, a in tensors.items():
        if not name.endswith(".lora_A"):
            continue
        module, b = name.removesuffix(".lora_A"), tensors[name.removesuffix("A") + "B"]
        if a.dim() == 3 and STACK.fullmatch(module):
            count = max(len(a), len(b))
            pairs = zip(a.expand(count, -1, -1), b.expand(count, -1, -1), strict=True)
            factors += [Factors(_expert(module, e), x, y) for e, (x, y) in enumerate(pairs)]
        else:
            factors.append(Factors(module, a, b))
    return factors, config["lora_alpha"] / config["r"], False


def _is_odd(stored: Stored) -> bool:
    name = stored.name
    stack = len(stored.shape) == 3 and STACK.search(name) and "lora_" in name
    return bool(stack) or bool(SPLIT.match(name)) or ".unembed_tokens." in name


def _plain(name: str) -> str:
    name = name.removesuffix(".weight").replace(".default", "")
    while name.startswith(("base_model.model.", "base_model.")):
        name = name.removeprefix("base_model.model." if name.startswith("base_model.model.") else "base_model.")
    return name.replace("model.unembed_tokens.", "lm_head.") if name.startswith("model.unembed") else name


def _expert(module: str, index: int) -> str:
    owner, _, part = module.rpartition(".")
    return f"{owner}.{index}.{part}"
