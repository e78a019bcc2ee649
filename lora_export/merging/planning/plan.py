"""Everything about a merge that follows from headers, decided or refused before the first output byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lora_export.checkpoint.reader import Checkpoint
from lora_export.checkpoint.shards import OutputTensor, Shard, plan_shards
from lora_export.contracts import Adapter, MergeOptions, TargetUpdate, TensorInfo
from lora_export.contracts.tensors import file_dtype
from lora_export.errors import AdapterError, CheckpointError
from lora_export.merging.planning.base import BaseWeight, base_weights, left_out, quantized_in_training
from lora_export.merging.planning.combine import combined
from lora_export.merging.planning.completeness import refuse_incomplete
from lora_export.merging.planning.ends import NewEnd, new_end
from lora_export.merging.planning.heads import NewModel, remodelled
from lora_export.merging.planning.names import unknown_target
from lora_export.merging.planning.replication import config_changes, layer_order
from lora_export.merging.planning.settle import Layout, settle
from lora_export.merging.planning.targets import match_targets
from lora_export.quantization import QuantizedWeight, TrainingQuantization, places_of

Operation = Literal["copied", "updated", "replaced", "dequantized", "converted"]
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: where its numbers come from, and what is done to them.

    source is the base's tensor (None for a new one); quantized: how to dequantize it; training: how training
    quantized it.
    """

    output: OutputTensor
    operation: Operation
    source: TensorInfo | None
    shape: tuple[int, ...]
    updates: tuple[TargetUpdate, ...] = ()
    quantized: QuantizedWeight | None = None
    training: TrainingQuantization | None = None

    @property
    def height(self) -> int:
        """Rows; a scalar has one."""
        return self.shape[0] if self.shape else 1

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64: fp32 arithmetic would round one of two fp32 numbers the wrong way."""
        return bool(self.updates) and (self.output.dtype in ("F32", "F64") or any(u.wide for u in self.updates))

    @property
    def copies(self) -> int:
        """How many copies of a block of it are in memory at once, counted in fp32."""
        return max((u.copies for u in self.updates), default=4) * (2 if self.wide else 1)

    @property
    def row_wise(self) -> bool:
        """Whether blocks of its rows can be computed separately."""
        quantized_apart = self.training is None or self.training.row_wise(self.shape)
        return quantized_apart and all(u.row_wise(self.shape) for u in self.updates)


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
    end: NewEnd | None = None  # of texts, by the tokenizer of an adapter
    model: NewModel | None = None  # where the output is of another class than the base

    @property
    def names(self) -> list[str]:
        """The tensors in the order of the output."""
        return [t.name for s in self.shards for t in s.tensors]

    @property
    def nbytes(self) -> int:
        return sum(len(s.header) + sum(t.nbytes for t in s.tensors) for s in self.shards)

    def inputs_of(self, tensor: PlannedTensor) -> list[TensorInfo]:
        """The base's tensors that hold its weight: one, or the parts of a quantized one."""
        if tensor.quantized:
            return [self.base.tensors[p] for p in tensor.quantized.parts]
        return [tensor.source] if tensor.source else []

    @property
    def computes(self) -> bool:
        """Whether anything but copying is done."""
        return any(t.operation != "copied" for t in self.tensors.values())

    @property
    def touched(self) -> tuple[str, ...]:
        """The tensors that adapters change or bring."""
        return tuple(n for n, t in self.tensors.items() if t.updates)

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
    order, given = layer_order(adapters), base
    weights = base_weights(base, options, order)
    unused = left_out(base, weights)
    new = remodelled(base, adapters, weights, options, order)
    if new:
        base, adapters, weights = new.base, new.adapters, new.weights
    targets, warnings = match_targets(base, adapters, weights)
    warnings += unused
    if options.combine != "none":
        targets = {name: combined(name, updates, adapters, options) for name, updates in targets.items()}
    replicated = config_changes(base.config, order) if order else {}
    layout = settle(base, weights, targets, adapters, replicated)
    trained = quantized_in_training(base, weights, options)
    planned = {
        name: _plan_tensor(name, weight, layout, trained.get(weight.name), options)
        for name, weight in (weights | {n: weights[source] for n, source in layout.added.items()}).items()
    }
    unknown = layout.targets.keys() - planned.keys()
    if unknown:
        raise unknown_target(min(unknown), base.tensors, str(base.folder))
    dequantized = any(w.quantized for w in weights.values())
    metadata = {} if dequantized else dict(given.metadata)  # of a quantized file it may say how to read its codes
    shards = plan_shards([p.output for p in planned.values()], options.max_shard_size, metadata, base.files)
    changes, removals = _config_edits(base, layout.config | replicated, dequantized, options)
    warnings += layout.warnings
    if new:
        changes, warnings = new.changes | changes, [*new.warnings, *warnings]
    incomplete = refuse_incomplete(base, {name: t.shape for name, t in planned.items()}, changes)
    warnings = [*warnings, *incomplete]
    model = new.model if new else None
    end = new_end(given.folder, {**given.config, **changes}, [a.folder for a in adapters if a.folder.is_dir()])
    if end is not None:
        changes, warnings = {**changes, **end.config}, [*warnings, end.warning]
    return MergePlan(
        given, tuple(adapters), options, tuple(shards), planned, changes, removals, tuple(warnings), end, model
    )


def without_updates(plan: MergePlan) -> MergePlan:
    """The same output without the adapters' changes; tensors that the base lacks or has in another size stay."""
    tensors = {}
    for name, tensor in plan.tensors.items():
        if tensor.source is not None and tensor.updates and tensor.source.shape == tensor.shape:
            computed = tensor.quantized is not None or tensor.training is not None
            operation = _operation((), computed, tensor.output.dtype != tensor.source.dtype)
            tensors[name] = replace(tensor, updates=(), operation=operation)
        elif tensor.quantized is not None and tensor.updates:
            tensors[name] = replace(tensor, updates=(), operation="dequantized")
        else:
            tensors[name] = tensor
    return replace(plan, tensors=tensors)


def _plan_tensor(
    name: str,
    weight: BaseWeight,
    layout: Layout,
    training: TrainingQuantization | None,
    options: MergeOptions,
) -> PlannedTensor:
    stored, source = weight.dtype, None if weight.brought else weight.info
    updates = layout.targets.get(name, [])
    if updates and stored not in FLOATS:
        raise CheckpointError(
            f"the adapter targets a tensor of type {stored}",
            where=weight.info.file,
            tensor=name,
            expected="a float type",
        )
    shape = _fit(name, weight, layout.shapes.get(name, weight.shape), updates)
    dtype = stored if options.dtype == "keep" or stored not in FLOATS else file_dtype(options.dtype)
    operation = _operation(updates, weight.quantized is not None or training is not None, dtype != stored)
    output = OutputTensor(name, dtype, shape, weight.shard)
    return PlannedTensor(output, operation, source, shape, tuple(updates), weight.quantized, training)


def _operation(updates: Sequence[TargetUpdate], dequantized: bool, converted: bool) -> Operation:
    if any(u.replaces for u in updates):
        return "replaced"
    if updates:
        return "updated"
    if dequantized:
        return "dequantized"
    return "converted" if converted else "copied"


def _fit(name: str, weight: BaseWeight, shape: tuple[int, ...], updates: Sequence[TargetUpdate]) -> tuple[int, ...]:
    """The output's shape, which every update must fit."""
    for update in updates:
        if not update.fits(shape):
            raise AdapterError(
                f"the adapter's {update.kind} fits a weight of shape {list(update.shapes[0])}, "
                f"the base's has {list(shape)}",
                where=weight.info.file,
                tensor=name,
                expected="the base that the adapter was trained on",
                next_step="give that base as -b; `lora-export inspect ADAPTER` shows its name",
            )
    return shape


def _config_edits(
    base: Checkpoint, wanted: Mapping[str, Any], dequantized: bool, options: MergeOptions
) -> tuple[dict[str, Any], frozenset[str]]:
    changes = dict(wanted)
    removals: frozenset[str] = places_of(base.config) if dequantized else frozenset()
    if options.dtype != "keep":
        key = "torch_dtype" if "torch_dtype" in base.config else "dtype"
        changes[key] = options.dtype
    return {k: v for k, v in changes.items() if base.config.get(k) != v}, removals
