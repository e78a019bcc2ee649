"""The weights of a base as a merge sees them: by the names of the result, with their logical shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import MergeOptions, TensorInfo
from lora_export.errors import CheckpointError, InputError
from lora_export.merging.planning.leftovers import activation_scales, without_leftovers
from lora_export.merging.planning.names import rename, resolve_prefix
from lora_export.merging.planning.replication import replicated_names
from lora_export.quantization import (
    QuantizedWeight,
    TrainingQuantization,
    find_quantized,
    quantized_modules,
    with_settings,
)


@dataclass(frozen=True)
class BaseWeight:
    """name: in the base; info: its bytes, or of a quantized weight the part that decides the shard.

    brought: the base has no such weight, an adapter brings all of it, and info only gives its type; home: the file
    of the base that its shard is named after, where it is not in the base.
    """

    name: str
    shape: tuple[int, ...]
    info: TensorInfo
    quantized: QuantizedWeight | None = None
    brought: bool = False
    home: Path | None = None

    @property
    def shard(self) -> str:
        return (self.home or self.info.file).name

    @property
    def dtype(self) -> str:
        return self.quantized.dtype if self.quantized else self.info.dtype


def base_weights(base: Checkpoint, options: MergeOptions, order: list[int] | None) -> dict[str, BaseWeight]:
    """Every weight of the result by its name there; order: the base's layer for each layer, if they are replicated.

    The parts of a quantized weight are no weights of their own.
    """
    quantized = find_quantized(base, with_settings(base.folder, base.config))
    _check_options(base, quantized, options)
    parts = {p for q in quantized.values() for p in q.parts}
    parts |= without_leftovers(base, parts, quantized)
    weights = {n: BaseWeight(n, t.shape, t) for n, t in base.tensors.items() if n not in parts}
    weights |= {n: BaseWeight(n, q.shape, base.tensors[q.parts[0]], q) for n, q in quantized.items()}
    in_file_order = {n: i for i, n in enumerate(base.tensors)}
    weights = dict(sorted(weights.items(), key=lambda item: in_file_order[item[1].info.name]))
    if order is None:
        return weights
    return {new: weights[old] for new, old in replicated_names(weights, order, str(base.folder)).items()}


def left_out(base: Checkpoint, weights: Mapping[str, BaseWeight]) -> list[str]:
    """A note on the base's tensors that the result lacks because they only serve activations."""
    parts = {p for w in weights.values() if w.quantized for p in w.quantized.parts}
    used = parts | {w.info.name for w in weights.values()}
    dead = activation_scales(n for n in base.tensors if n not in used) if parts else []
    leaves = ", ".join(sorted({n.rpartition(".")[2] for n in dead}))
    text = f"{len(dead)} scales of activations ({leaves}) are left out: no layer of the result is quantized"
    return [text] if dead else []


def _check_options(base: Checkpoint, quantized: Mapping[str, QuantizedWeight], options: MergeOptions) -> None:
    if quantized and options.base_weights == "original":
        raise InputError(
            "--base-weights original, but this base is stored quantized: the original weights are not here",
            where=base.folder,
            expected="the unquantized base",
            next_step="give the unquantized base as -b, or drop --base-weights",
        )
    if quantized and options.training_quantization != "none":
        raise InputError(
            f"--training-quantization {options.training_quantization}, but this base is already stored quantized",
            where=base.folder,
            next_step="drop --training-quantization",
        )


def quantized_in_training(
    base: Checkpoint, weights: Mapping[str, BaseWeight], options: MergeOptions
) -> dict[str, TrainingQuantization]:
    """Weight of the base → how training quantized it on the fly (`--training-quantization`)."""
    if options.training_quantization == "none" or options.base_weights == "original":
        return {}
    modules = {f"{m}.weight": conv1d for m, conv1d in quantized_modules(base.folder, base.config).items()}
    stored = {w.name for w in weights.values()}
    change = resolve_prefix(modules, stored)
    method, double = options.training_quantization, options.training_double_quant
    quantized = {rename(n, change): TrainingQuantization(method, double, t) for n, t in modules.items()}
    missing = quantized.keys() - stored
    if missing:
        raise CheckpointError(
            "a layer that training quantized is not in the checkpoint", where=base.folder, tensor=min(missing)
        )
    return quantized
