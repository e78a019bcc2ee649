"""Adapters that are combined as one adapter for PEFT: the oracle of a combination.

What each adapter does to a layer is asked of PEFT's own layer with one-hot inputs; the deltas, whole matrices in
float64, are combined here by formulas written anew from the papers (task arithmetic, arXiv:2212.04089; TIES,
arXiv:2306.01708, with PEFT's weights; DARE, arXiv:2311.03099), and become a LoRA of full rank whose one factor is
the identity. PEFT then runs it unmerged, like any adapter.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError, InputError
from lora_export.validation.reference.files import ADAPTER_CONFIG, START
from lora_export.validation.reference.probes import base_layer, width_of, wrapped_modules
from lora_export.validation.reference.whole import OneHot

WITHOUT_A_RUN = "lora-export merge with the same options: its certificate checks the arithmetic"
_ALIKE_IN_FP32 = ("FOURIERFT", "C3A")
ALIKE = 2.0**-39  # of a size: what float64 cannot tell apart, as these deltas are differences of answers
Array = np.ndarray[Any, np.dtype[np.float64]]


def reference_adapter(
    base: Path, adapters: Sequence[AdapterChoice], options: MergeOptions, dequantized: Path | None, folder: Path
) -> AdapterChoice:
    """An adapter in `folder` that does to every layer what the combination does. A weight of 1.

    AdapterError for layers that are neither linear nor embeddings, and for weights that an adapter replaces.
    """
    work = folder / "deltas"
    work.mkdir(parents=True)
    targets: dict[str, CombinedLayer] = {}
    for which, choice in enumerate(adapters):
        for path, layer, matrices in _asked(base, choice, options, dequantized):
            target = targets.setdefault(path, CombinedLayer(path, type(layer)))
            target.owners.append(which)
            target.weights.append(choice.weight)
            save_file(matrices, work / target.file(which))
    _write(folder / "combined", list(targets.values()), work, options)
    return AdapterChoice(folder / "combined")


@dataclass
class CombinedLayer:
    """A layer that some of the adapters change."""

    path: str
    layer: type
    owners: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def file(self, which: int) -> str:
        return f"{which}-{self.path}.safetensors"


def _asked(
    base: Path, choice: AdapterChoice, options: MergeOptions, dequantized: Path | None
) -> Iterator[tuple[str, Any, dict[str, torch.Tensor]]]:
    """(path, plain layer, what the adapter alone does there): its delta, or A, B and their scaling."""
    from lora_export.validation.reference.unmerged import load_unmerged

    model = load_unmerged(base, [AdapterChoice(choice.folder)], options, dequantized).model
    kind = next(iter(model.peft_config.values())).peft_type
    if kind in _ALIKE_IN_FP32 and options.combine in ("ties", "magnitude_prune") and (options.density or 1) < 1:
        raise _not_validated(
            f"{kind.value}: PEFT makes its delta in fp32, where elements that the formula makes equal differ "
            "a little, so the elements that --density keeps cannot be validated",
            choice,
            None,
            "a combination that does not choose by size",
        )
    for path, module in wrapped_modules(model).items():
        layer = base_layer(module)
        plain = path.removeprefix(START)
        if hasattr(module, "modules_to_save") or not isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
            raise _not_validated(
                f"{type(module).__name__}: a combination is validated on linear layers and embeddings only",
                choice,
                plain,
                "adapters of such layers alone, where they are combined",
            )
        if _changes_bias(module):
            raise _not_validated(
                f"{type(module).__name__} changes a bias as well, and a combination is validated on weights alone",
                choice,
                plain,
                "adapters that change weights alone, where they are combined",
            )
        yield plain, layer, _factors(module) if options.combine_on == "factors" else {"delta": _delta(module)}


def _not_validated(problem: str, choice: AdapterChoice, tensor: str | None, expected: str) -> AdapterError:
    return AdapterError(
        problem,
        where=choice.folder,
        tensor=tensor,
        expected=expected,
        next_step=WITHOUT_A_RUN,
    )


def _factors(module: Any) -> dict[str, torch.Tensor]:
    name = module.active_adapters[0]
    embedding = name in module.lora_embedding_A
    pair = (
        (module.lora_embedding_A[name], module.lora_embedding_B[name])
        if embedding
        else (module.lora_A[name].weight, module.lora_B[name].weight)
    )
    a, b = (p.detach().double().contiguous() for p in pair)
    return {"A": a, "B": b, "scaling": torch.tensor(module.scaling[name], dtype=torch.float64)}


@torch.no_grad()
def _delta(module: Any) -> torch.Tensor:
    """(inputs, outputs) of a linear layer, (rows, width) of an embedding; float64."""
    exact = copy.deepcopy(module).double()
    layer = base_layer(exact)
    if isinstance(layer, nn.Embedding):
        rows: torch.Tensor = exact(torch.arange(layer.num_embeddings)) - layer.weight
        return rows.contiguous()
    one_hot = OneHot(layer)
    one_hot.speak_for(layer)
    answers = torch.cat([exact(block) for block in one_hot.blocks()])
    del layer.forward
    width = width_of(layer)
    plain = layer(torch.eye(width, dtype=torch.float64))
    delta: torch.Tensor = answers - plain
    return delta.contiguous()


@torch.no_grad()
def _changes_bias(module: Any) -> bool:
    layer = base_layer(module)
    if isinstance(layer, nn.Embedding) or layer.bias is None:
        return False
    zeros = torch.zeros(1, width_of(layer))
    return not torch.equal(module(zeros)[0], layer.bias)


def _write(folder: Path, targets: Sequence[CombinedLayer], work: Path, options: MergeOptions) -> None:
    tensors, ranks = {}, {}
    for target in targets:
        parts = [load_file(work / target.file(which)) for which in target.owners]
        delta = torch.from_numpy(_combined(target, parts, options)).float()
        if target.layer is nn.Embedding:  # PEFT adds (B·A)ᵀ
            a, b, names = delta.T, torch.eye(delta.shape[1]), ("lora_embedding_A", "lora_embedding_B")
        else:  # delta: (inputs, outputs)
            wide = delta.shape[0] > delta.shape[1]
            eye = torch.eye(min(delta.shape))
            a, b = (delta.T, eye) if wide else (eye, delta.T)
            names = ("lora_A.weight", "lora_B.weight")
        ranks[target.path] = len(a)
        for name, value in zip(names, (a, b), strict=True):
            tensors[f"{START}{target.path}.{name}"] = value.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks,
        "target_modules": list(ranks), "fan_in_fan_out": any(t.layer is Conv1D for t in targets),
    }  # fmt: skip
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")


# --- the formulas ------------------------------------------------------------------------------------------


def _combined(target: CombinedLayer, parts: Sequence[dict[str, torch.Tensor]], options: MergeOptions) -> Array:
    """The combined delta, laid out as those that it is made of."""
    if options.combine_on == "factors":
        return _of_factors(target, parts, options)
    turned = target.layer is nn.Linear  # its weight is (outputs, inputs), and choices are made on the weight
    deltas = [p["delta"].numpy().T if turned else p["delta"].numpy() for p in parts]
    mixed = _mixed(deltas, target.weights, target, f"{target.path}.weight", options)
    rank = options.svd_rank
    if options.combine == "svd" and rank is None:
        raise InputError(
            "validating a combination by svd needs its rank",
            expected="--svd-rank beside --combine svd",
            next_step="the same command with --svd-rank",
        )
    if rank is not None:
        u, sizes, v = np.linalg.svd(mixed, full_matrices=False)
        mixed = (u[:, :rank] * sizes[:rank]) @ v[:rank]
    return np.ascontiguousarray(mixed.T if turned else mixed)


def _of_factors(target: CombinedLayer, parts: Sequence[dict[str, torch.Tensor]], options: MergeOptions) -> Array:
    scales = [w * float(p["scaling"]) for w, p in zip(target.weights, parts, strict=True)]
    roots = [math.sqrt(abs(s)) for s in scales]
    signed = [math.copysign(r, s) for r, s in zip(roots, scales, strict=True)]
    name = f"{target.path}.weight"
    turned = target.layer is not nn.Linear  # the weight is (B·A)ᵀ: what it calls B is Aᵀ
    a, b = (
        _mixed(
            [p[side].numpy().T if turned else p[side].numpy() for p in parts],
            weights,
            target,
            f"{name}/{('B' if side == 'A' else 'A') if turned else side}",
            options,
        )
        for side, weights in (("A", signed), ("B", roots))
    )
    product = a @ b if turned else (b @ a).T
    return np.ascontiguousarray(product)


def _mixed(
    deltas: Sequence[Array], weights: Sequence[float], target: CombinedLayer, name: str, options: MergeOptions
) -> Array:
    density = options.density
    if density is not None and density < 1:
        if options.combine.startswith("dare"):
            masks = [
                _drawn(options.seed, which, name, density, d.shape)
                for which, d in zip(target.owners, deltas, strict=True)
            ]
            deltas = [np.where(mask, d / density, 0.0) for mask, d in zip(masks, deltas, strict=True)]
        else:
            deltas = [_largest(d, int(density * d.size)) for d in deltas]
    if options.combine not in ("ties", "dare_ties"):
        total: Array = np.sum([w * d for w, d in zip(weights, deltas, strict=True)], axis=0)
        return total
    votes = np.sum([d if options.majority_sign == "total" else np.sign(d) for d in deltas], axis=0)
    agree = [np.sign(d) == np.where(votes >= 0, 1, -1) for d in deltas]
    total = np.sum([w * d * mask for w, d, mask in zip(weights, deltas, agree, strict=True)], axis=0)
    mean: Array = total / np.maximum(np.sum(agree, axis=0), 1)
    return mean


def _largest(delta: Array, count: int) -> Array:
    """The `count` largest elements, or more where several are as large as the least of them (MiSS repeats each)."""
    if count <= 0:
        return np.zeros_like(delta)
    sizes = np.abs(delta)
    least = -np.partition(-sizes, count - 1, axis=None)[count - 1]
    kept: Array = np.where(sizes >= least * (1 - ALIKE), delta, 0.0)
    return kept


def _drawn(seed: int, which: int, name: str, density: float, shape: tuple[int, ...]) -> Any:
    """A merge's draws, by what is documented of them: a Philox key of seed, adapter and name, 32 bits each."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{which}/{name}".encode(), digest_size=16).digest(), "little")
    count = math.prod(shape)
    numbers = np.random.Philox(key=key).random_raw((count + 1) // 2).view(np.uint32)[:count]
    return (numbers < density * 2.0**32).reshape(shape)
