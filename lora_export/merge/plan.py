"""Everything about a merge that headers can tell, decided and refused before the first output byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lora_export.checkpoint.reader import Checkpoint, file_dtype
from lora_export.checkpoint.shards import OutputTensor, Shard, plan_shards
from lora_export.contracts import Adapter, MergeOptions, TargetUpdate, TensorInfo
from lora_export.errors import AdapterError, CheckpointError, InputError
from lora_export.merge.names import (
    INPUT_EMBEDDINGS,
    OUTPUT_HEADS,
    rename,
    resolve_prefix,
    stored_pair,
    tied_pair,
    unknown_target,
)
from lora_export.quantization import QuantizedWeight, TrainingQuantization, find_quantized, quantized_modules

Operation = Literal["copied", "updated", "replaced", "dequantized", "converted"]
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
EMBEDDING_NAMES = frozenset({n.split(".")[-2] for n in INPUT_EMBEDDINGS})
_TIED_HEADS = ("MaskedLM", "PreTraining", "ConditionalGeneration", "LMHead", "CausalLM")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: where its numbers come from, and what is done to them.

    source is the base's tensor (None for a new one); quantized tells how to dequantize it; training, how
    training had quantized it.
    """

    output: OutputTensor
    operation: Operation
    source: TensorInfo | None
    shape: tuple[int, ...]
    updates: tuple[TargetUpdate, ...] = ()
    quantized: QuantizedWeight | None = None
    training: TrainingQuantization | None = None


@dataclass(frozen=True)
class MergePlan:
    base: Checkpoint
    adapters: tuple[Adapter, ...]
    options: MergeOptions
    shards: tuple[Shard, ...]
    tensors: Mapping[str, PlannedTensor]
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    config_removals: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(len(s.header) + sum(t.nbytes for t in s.tensors) for s in self.shards)

    @property
    def counts(self) -> dict[str, int]:
        return {n: sum(t.operation == n for t in self.tensors.values()) for n in get_args(Operation)}

    @property
    def dtype(self) -> str:
        """The type that most bytes of the output have, by torch's name."""
        sizes: dict[str, int] = {}
        for t in self.tensors.values():
            sizes[t.output.dtype] = sizes.get(t.output.dtype, 0) + t.output.nbytes
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
        largest = max(sizes, key=lambda d: sizes[d])
        return names.get(largest, largest)


def plan_merge(base: Checkpoint, adapters: Sequence[Adapter], options: MergeOptions) -> MergePlan:
    """The plan for `base` with `adapters` merged in turn. Raises for whatever cannot be done faithfully."""
    quantized = find_quantized(base, base.config)
    _check_base_weights(base, quantized, options)
    weights = _logical_weights(base, quantized)
    targets, warnings = _match_targets(base, adapters, weights)
    untie = _untie(base, weights, targets)
    trained = _trained_quantized(base, weights, quantized, options)
    planned: dict[str, PlannedTensor] = {}
    for name, shape in weights.items():
        planned[name] = _plan_tensor(
            base, name, shape, targets.pop(name, []), quantized.get(name), trained.get(name), options
        )
    for name in list(targets):
        planned[name] = _plan_new(base, name, targets.pop(name), untie, options)
    if untie and untie[1] not in planned:
        planned[untie[1]] = _plan_new(base, untie[1], [], untie, options)
    shards = plan_shards([p.output for p in planned.values()], options.max_shard_size, dict(base.metadata))
    changes, removals = _config_edits(base, planned, untie, quantized, options)
    return MergePlan(base, tuple(adapters), options, tuple(shards), planned, changes, removals, tuple(warnings))


def _check_base_weights(base: Checkpoint, quantized: Mapping[str, Any], options: MergeOptions) -> None:
    if quantized and options.base_weights == "original":
        raise InputError(
            "--base-weights original, but this base is stored quantized: the original weights are not here",
            where=base.folder,
            expected="the unquantized base",
            next_step="give the unquantized base as -b, or leave --base-weights away",
        )
    if quantized and options.training_quantization != "none":
        raise InputError(
            f"--training-quantization {options.training_quantization}, but this base is stored quantized already",
            where=base.folder,
            next_step="leave --training-quantization away",
        )


def _logical_weights(base: Checkpoint, quantized: Mapping[str, QuantizedWeight]) -> dict[str, tuple[int, ...]]:
    """Name and true shape of every weight; the parts of quantized weights are no weights of their own."""
    parts = {p for q in quantized.values() for p in q.parts} - set(quantized)
    return {
        name: quantized[name].shape if name in quantized else info.shape
        for name, info in base.tensors.items()
        if name not in parts
    }


def _match_targets(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, list[TargetUpdate]], list[str]]:
    """Checkpoint name → updates, replacements first. Every update finds its weight, or is refused."""
    targets: dict[str, list[TargetUpdate]] = {}
    warnings: list[str] = []
    tied = tied_pair(weights)
    for adapter in adapters:
        change = resolve_prefix((u.target for u in adapter.updates), weights)
        if any(change):
            warnings.append(f"names of {adapter.folder.name} were matched with a changed prefix: {change}")
        for update in adapter.updates:
            name = rename(update.target, change)
            if name not in weights:
                name = update.target
            if name not in weights and not (tied and name == tied[1]):
                raise unknown_target(update.target, weights, str(adapter.folder))
            targets.setdefault(name, []).append(update)
    for name, updates in targets.items():
        updates.sort(key=lambda u: not u.replaces)
        if sum(u.replaces for u in updates) > 1:
            raise AdapterError(
                "two adapters replace this tensor", where=adapters[-1].folder, tensor=name, expected="one of them"
            )
    return targets, warnings


def _untie(
    base: Checkpoint, weights: Mapping[str, tuple[int, ...]], targets: Mapping[str, Sequence[TargetUpdate]]
) -> tuple[str, str] | None:
    """(embedding, head) if the adapter changes one of a tied pair: PEFT's forward changes only that one."""
    # A head may be stored although the config ties it: then the two are still one until the config says otherwise.
    pair = tied_pair(weights) or stored_pair(weights)
    if not base.config.get("tie_word_embeddings", True):
        return None
    if pair is None or not _is_language_model(base):
        _refuse_hidden_tie(base, weights, targets)
        return None
    # An embedding saved because the vocabulary was resized changed before training, for both of the pair.
    trained = any(u.kind != "embedding" for u in targets.get(pair[0], ()))
    return pair if trained or pair[1] in targets else None


def _refuse_hidden_tie(
    base: Checkpoint, weights: Mapping[str, tuple[int, ...]], targets: Mapping[str, Sequence[TargetUpdate]]
) -> None:
    """Refuse to change an embedding that shares its weight with an output this tool cannot give its own."""
    architecture = (base.config.get("architectures") or [""])[0]
    if not any(head in architecture for head in _TIED_HEADS) or any(w.endswith(OUTPUT_HEADS) for w in weights):
        return
    for name, updates in targets.items():
        is_embedding = name.endswith(".weight") and name.split(".")[-2] in EMBEDDING_NAMES
        if is_embedding and any(u.kind != "embedding" for u in updates):
            raise AdapterError(
                f"the adapter changes an embedding whose weight {architecture} also uses for its output",
                where=base.folder,
                tensor=name,
                expected="an adapter that leaves the tied embedding alone, or a base without tied weights",
                next_step="serve it unmerged with PEFT",
            )


def _is_language_model(base: Checkpoint) -> bool:
    return any("LMHead" in a or "CausalLM" in a for a in base.config.get("architectures") or ())


def _trained_quantized(
    base: Checkpoint,
    weights: Mapping[str, tuple[int, ...]],
    quantized: Mapping[str, Any],
    options: MergeOptions,
) -> dict[str, TrainingQuantization]:
    if options.training_quantization == "none" or options.base_weights == "original" or quantized:
        return {}
    how = TrainingQuantization(options.training_quantization, options.training_double_quant)
    names = [f"{m}.weight" for m in quantized_modules(base.folder, base.config)]
    change = resolve_prefix(names, weights)
    found = {rename(n, change) for n in names}
    missing = found - set(weights)
    if missing:
        raise CheckpointError(
            "a layer that training quantized is not in the checkpoint", where=base.folder, tensor=min(missing)
        )
    return dict.fromkeys(found, how)


def _plan_tensor(
    base: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    updates: list[TargetUpdate],
    quantized: QuantizedWeight | None,
    training: TrainingQuantization | None,
    options: MergeOptions,
) -> PlannedTensor:
    info = base.tensors[name]
    stored = quantized.dtype if quantized else info.dtype
    if updates and stored not in FLOATS:
        raise CheckpointError(
            f"the adapter targets a tensor of type {stored}", where=info.file, tensor=name, expected="a float type"
        )
    shape = _fit(base, name, shape, updates)
    dtype = stored if options.dtype == "keep" or stored not in FLOATS else file_dtype(options.dtype)
    operation = _operation(updates, quantized is not None or training is not None, dtype != stored)
    return PlannedTensor(
        OutputTensor(name, dtype, shape, info.file.name),
        operation,
        info,
        shape,
        tuple(updates),
        quantized,
        training,
    )


def _operation(updates: Sequence[TargetUpdate], dequantized: bool, converted: bool) -> Operation:
    if any(u.replaces for u in updates):
        return "replaced"
    if updates:
        return "updated"
    if dequantized:
        return "dequantized"
    return "converted" if converted else "copied"


def _fit(base: Checkpoint, name: str, shape: tuple[int, ...], updates: Sequence[TargetUpdate]) -> tuple[int, ...]:
    """The output's shape; a replacement may bring another number of rows to an embedding."""
    for update in updates:
        if update.replaces and _resizes(update.shapes[0], shape, name):
            shape = tuple(n or 0 for n in update.shapes[0])
        elif not update.fits(shape):
            raise AdapterError(
                f"the adapter's {update.kind} fits a weight of shape {list(update.shapes[0])}, "
                f"the base's has {list(shape)}",
                where=base.tensors[name].file if name in base.tensors else base.folder,
                tensor=name,
                expected="the base that the adapter was trained on",
                next_step="give that base as -b; `lora-export inspect ADAPTER` shows its name",
            )
    return shape


def _resizes(new: tuple[int | None, ...], old: tuple[int, ...], name: str) -> bool:
    return name in (*INPUT_EMBEDDINGS, *OUTPUT_HEADS) and len(new) == len(old) == 2 and new[1] == old[1]


def _plan_new(
    base: Checkpoint,
    name: str,
    updates: list[TargetUpdate],
    untie: tuple[str, str] | None,
    options: MergeOptions,
) -> PlannedTensor:
    """An output head that the base did not store because it was tied: it starts as the embedding."""
    if untie is None or name != untie[1]:
        raise unknown_target(name, base.tensors, str(base.folder))
    info = base.tensors[untie[0]]
    shape = _fit(base, name, info.shape, updates)
    dtype = info.dtype if options.dtype == "keep" else file_dtype(options.dtype)
    operation = _operation(updates, False, dtype != info.dtype)
    output = OutputTensor(name, dtype, shape, info.file.name)
    return PlannedTensor(output, operation, info, shape, tuple(updates))


def _config_edits(
    base: Checkpoint,
    planned: Mapping[str, PlannedTensor],
    untie: tuple[str, str] | None,
    quantized: Mapping[str, Any],
    options: MergeOptions,
) -> tuple[dict[str, Any], frozenset[str]]:
    changes: dict[str, Any] = {}
    removals = frozenset({"quantization_config"}) if quantized else frozenset()
    if untie:
        changes["tie_word_embeddings"] = False
    if options.dtype != "keep":
        key = "torch_dtype" if "torch_dtype" in base.config else "dtype"
        changes[key] = options.dtype
    rows = {
        p.shape[0]
        for n, p in planned.items()
        if p.operation == "replaced" and p.source is not None and p.shape != p.source.shape and len(p.shape) == 2
    }
    if len(rows) > 1:
        raise AdapterError(
            f"embedding and output head were resized to different sizes: {sorted(rows)}", where=base.folder
        )
    if rows:
        changes["vocab_size"] = rows.pop()
        _check_resized_together(base, planned, changes["vocab_size"], untie)
    return {k: v for k, v in changes.items() if base.config.get(k) != v}, removals


def _check_resized_together(
    base: Checkpoint, planned: Mapping[str, PlannedTensor], rows: int, untie: tuple[str, str] | None
) -> None:
    for name in (*INPUT_EMBEDDINGS, *OUTPUT_HEADS):
        if name in planned and planned[name].shape[0] != rows:
            raise AdapterError(
                f"the vocabulary was resized to {rows}, but this tensor still has {planned[name].shape[0]} rows",
                where=base.folder,
                tensor=name,
                expected="both the embedding and the output head in the adapter",
                next_step="save the adapter with save_embedding_layers=True",
            )
