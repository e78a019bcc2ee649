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
from safetensors import safe_open
from safetensors.torch import load_file

from lora_export.contracts import AdapterChoice
from lora_export.errors import AdapterError
from lora_export.storage.sealed import read_json
from lora_export.validation.reference.foreign_saved import CONFIG, SPLIT, STACK, Factors, Writer

Read = tuple[list[Factors], float, bool]  # scale; whether a tied head has its embedding's update


def as_peft(base: Path, adapters: Sequence[AdapterChoice], folder: Path) -> list[AdapterChoice]:
    """The same choices, each that PEFT cannot load replaced by one in `folder` that it can."""
    found = []
    for i, choice in enumerate(adapters):
        read = _read(choice.folder)
        if read is None:
            found.append(choice)
            continue
        target = folder / f"as-peft-{i}"
        target.mkdir(parents=True)
        Writer(base, choice.folder, target, *read).write()
        found.append(AdapterChoice(target, choice.weight))
    return found


def _read(folder: Path) -> Read | None:
    """None for an adapter that PEFT loads. AdapterError for one that holds less than its trainer writes."""
    config = read_json(folder / CONFIG)
    try:
        return _mlx(folder, config) or _stacked(folder, config)
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError, OSError) as error:
        raise AdapterError(
            f"the adapter is not whole: {error}",
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
    found: list[Factors] = []
    for module, held in parts.items():
        a, b, m = held["lora_a"], held["lora_b"], held.get("m")
        if b.dim() == 3:
            found += [
                Factors(_expert(module, e), x, y)
                for e, (x, y) in enumerate(zip(a.reshape(len(b), -1, a.shape[-1]), b, strict=True))
            ]
        elif module.endswith(("embed_tokens", "wte", "word_embeddings", "embed_in")):
            found.append(Factors(module, b, a, m))
        else:
            found.append(Factors(module, a.T, b.T, m))
    return found, float(parameters["scale"]), True


def _stacked(folder: Path, config: Mapping[str, Any]) -> Read | None:
    """None unless the file holds what PEFT has no layer for."""
    files = sorted(folder.glob("adapter_model*.safetensors")) or sorted(folder.glob("model*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    odd = False
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                shape = opened.get_slice(name).get_shape()
                stack = len(shape) == 3 and STACK.search(name) and "lora_" in name
                odd |= bool(stack) or bool(SPLIT.match(name)) or ".unembed_tokens." in name
    if not odd or not all("lora_A" in n or "lora_B" in n for file in files for n in _names(file)):
        return None
    for file in files:
        tensors |= {_plain(name): value.double() for name, value in load_file(file).items()}
    found: list[Factors] = []
    for name, a in tensors.items():
        if not name.endswith(".lora_A"):
            continue
        module, b = name.removesuffix(".lora_A"), tensors[name.removesuffix("A") + "B"]
        if a.dim() == 3 and STACK.fullmatch(module):
            count = max(len(a), len(b))
            pairs = zip(a.expand(count, -1, -1), b.expand(count, -1, -1), strict=True)
            found += [Factors(_expert(module, e), x, y) for e, (x, y) in enumerate(pairs)]
        else:
            found.append(Factors(module, a, b))
    return found, config["lora_alpha"] / config["r"], False


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="np") as opened:
        return list(opened.keys())


def _plain(name: str) -> str:
    name = name.removesuffix(".weight").replace(".default", "")
    while name.startswith(("base_model.model.", "base_model.")):
        name = name.removeprefix("base_model.model." if name.startswith("base_model.model.") else "base_model.")
    return name.replace("model.unembed_tokens.", "lm_head.") if name.startswith("model.unembed") else name


def _expert(module: str, index: int) -> str:
    owner, _, part = module.rpartition(".")
    return f"{owner}.{index}.{part}"
