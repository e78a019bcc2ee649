"""What a merge does to a pipeline: a plan for each component that an adapter changes, from headers alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from lora_export.adapters import CONFIG, AdapterFile, read_adapter
from lora_export.adapters.diffusion.finding import component_of
from lora_export.adapters.diffusion.kinds import updates_of
from lora_export.adapters.diffusion.pieces import refuse_changed
from lora_export.adapters.diffusion.reading import understand
from lora_export.checkpoint import Checkpoint, open_adapter_files
from lora_export.checkpoint.adapter_files import open_single_file, single_file
from lora_export.checkpoint.pipeline import open_component, open_pipeline, refuse_missing_variant
from lora_export.contracts import (
    Adapter,
    AdapterChoice,
    DiffusionAdapter,
    Interference,
    MergeOptions,
    Pipeline,
    TargetUpdate,
)
from lora_export.errors import AdapterError, InputError
from lora_export.merging.pipelines.embeddings import NewTokens
from lora_export.merging.planning.base import base_weights
from lora_export.merging.planning.combine import check_options
from lora_export.merging.planning.plan import MergePlan, plan_merge
from lora_export.merging.running.interference import interference
from lora_export.merging.running.read_base import ReadBase

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
_LARGE = 2**20  # numbers; there are few of them in a small weight, and each counts


@dataclass(frozen=True)
class PipelinePlan:
    """components: plans of those that change, in the order of the pipeline; skipped: those that an adapter changes
    and that stay as they are, as `--skip` says; choices, adapters: in the order of the command; merged_into:
    component → the choices that change it; tokens: those that vectors of textual inversion bring."""

    pipeline: Pipeline
    options: MergeOptions
    choices: tuple[AdapterChoice, ...]
    adapters: tuple[DiffusionAdapter, ...]
    components: Mapping[str, MergePlan]
    skipped: tuple[str, ...]
    checkpoints: Mapping[str, Checkpoint]
    merged_into: Mapping[str, tuple[AdapterChoice, ...]]
    tokens: NewTokens

    @property
    def counts(self) -> dict[str, int]:
        """Over the components that change."""
        totals: dict[str, int] = {}
        for plan in self.components.values():
            for name, count in plan.counts.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    @property
    def nbytes(self) -> int:
        """Of all weights of the output."""
        kept = [c.nbytes for n, c in self.checkpoints.items() if n not in self.components]
        return sum(kept) + sum(p.nbytes for p in self.components.values())

    @property
    def adapter_tensors(self) -> int:
        return sum(a.tensor_count for p in self.components.values() for a in p.adapters)

    @property
    def computes(self) -> bool:
        """Whether anything but copying is done."""
        return any(p.computes for p in self.components.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was noticed in the adapters, and what `--skip` leaves out."""
        left = tuple(f"{name} stays unmerged, as --skip says" for name in self.skipped)
        return (*(w for a in self.adapters for w in a.warnings), *self.tokens.warnings(self.components), *left)


def plan_pipeline(base: Path, adapters: Sequence[AdapterChoice], options: MergeOptions) -> PipelinePlan:
    """Read headers, names and metadata, and decide everything about every component.

    Raises LoraExportError for whatever a merge could not do faithfully.
    """
    check_options(options)
    pipeline = open_pipeline(base)
    refuse_missing_variant(pipeline, options.variant)
    checkpoints = {n: open_component(c, options.variant) for n, c in pipeline.components.items()}
    _check_skipped(pipeline, options.skip)
    shapes = {n: {t: i.shape for t, i in c.tensors.items()} for n, c in checkpoints.items()}
    models = {n: _model(c, options) for n, c in checkpoints.items()}
    understood: list[DiffusionAdapter] = []
    read: dict[str, list[Adapter]] = {}
    merged_into: dict[str, list[AdapterChoice]] = {}
    tokens = NewTokens(pipeline, shapes)
    for choice in adapters:
        adapter, parts = _read(choice, pipeline, shapes, models, tokens, options)
        understood.append(adapter)
        for name, part in parts.items():
            if options.combine == "none":
                refuse_changed(part, read.get(name, ()))
            read.setdefault(name, []).append(part)
            merged_into.setdefault(name, []).append(choice)
    skipped = tuple(n for n in pipeline.components if n in read and n in options.skip)
    plans = {
        n: tokens.planned(n, _exact(plan_merge(checkpoints[n], read[n], options)))
        for n in pipeline.components
        if n in read and n not in skipped
    }
    if adapters and not plans:
        raise InputError(
            f"--skip {', --skip '.join(skipped)}: the adapter changes nothing else",
            where=base,
            expected="a component that is merged",
            next_step="drop --skip",
        )
    into = {n: tuple(c) for n, c in merged_into.items()}
    return PipelinePlan(
        pipeline, options, tuple(adapters), tuple(understood), plans, skipped, checkpoints, into, tokens
    )


def interference_of(planned: MergePlan | PipelinePlan) -> list[Interference]:
    """What several adapters do to each other, in a model or in each component of a pipeline."""
    plans = [planned] if isinstance(planned, MergePlan) else list(planned.components.values())
    return [pair for plan in plans if len(plan.adapters) > 1 for pair in interference(plan)]


def _model(checkpoint: Checkpoint, options: MergeOptions) -> ReadBase:
    return ReadBase(checkpoint, base_weights(checkpoint, options, None), options)


def _check_skipped(pipeline: Pipeline, skip: Collection[str]) -> None:
    for name in skip:
        if name not in pipeline.components:
            raise InputError(
                f"--skip {name}: the pipeline has no such component",
                where=pipeline.folder,
                expected=f"one of {', '.join(pipeline.components)}",
            )


def _read(
    choice: AdapterChoice,
    pipeline: Pipeline,
    shapes: Shapes,
    models: Mapping[str, ReadBase],
    tokens: NewTokens,
    options: MergeOptions,
) -> tuple[DiffusionAdapter, dict[str, Adapter]]:
    """An adapter understood, and what it does to each component."""
    path = single_file(choice.folder)
    weight = choice.weight if options.combine == "none" else 1.0
    if path is None:
        config, tensors = open_adapter_files(choice.folder)
        file = AdapterFile(tensors, config, choice.folder / CONFIG, weight)
        metadata: Mapping[str, str] = {}
    else:
        tensors, metadata = open_single_file(path)
        file = AdapterFile(tensors, {}, path, weight)
    file = replace(file, allow_nonfinite=options.allow_nonfinite)
    if not file.tensors:
        raise file.refuse("the adapter holds no tensors", expected="trained matrices")
    adapter = understand(file, metadata, pipeline, shapes, options.split_qkv_alpha)
    if path is None and not adapter.modules:  # a kind that PEFT alone defines
        return adapter, _of_peft(file, choice, shapes, models)
    updates: dict[str, list[TargetUpdate]] = {}
    for module in adapter.modules:
        name = module.component
        own = replace(file, base=models[name], base_shapes=shapes[name])
        updates.setdefault(name, []).extend(updates_of(own, module, shapes[name]))
    _check_claims(file, adapter)
    for name, rows in tokens.take(file, adapter, options).items():
        updates.setdefault(name, []).extend(rows)
    return adapter, {name: _adapter(file, choice, adapter, name, updates[name]) for name in updates}


def _adapter(
    file: AdapterFile,
    choice: AdapterChoice,
    adapter: DiffusionAdapter,
    name: str,
    updates: Sequence[TargetUpdate],
) -> Adapter:
    """The part of an adapter that belongs to one component."""
    keys = {k for m in adapter.modules if m.component == name for k in (*m.keys.values(), m.alpha_key) if k}
    keys |= {k for u in updates for k in u.keys if k in adapter.vectors}
    tensors = {k: t for k, t in file.tensors.items() if k in keys}
    return Adapter(file.folder, adapter.format, dict(file.config), tuple(updates), tensors, choice.weight)


def _of_peft(
    file: AdapterFile, choice: AdapterChoice, shapes: Shapes, models: Mapping[str, ReadBase]
) -> dict[str, Adapter]:
    name = component_of(file, shapes)
    own = replace(file, base=models[name], base_shapes=shapes[name])
    return {name: replace(read_adapter(own), weight=choice.weight)}


def _exact(plan: MergePlan) -> MergePlan:
    """The same in float64, whatever is written, but for large weights in fp16.

    An update of an image model may be as large as the weight. Where the two cancel, fp32 leaves few digits, and
    bf16 numbers so small need all of theirs. fp16 has no such small numbers: in fp32 one or two of ten thousand
    are rounded to the other neighbour, and a merge of 5 GB takes a third less time.
    """
    tensors = dict(plan.tensors)
    for name, tensor in tensors.items():
        if tensor.output.dtype != "F16" or prod(tensor.shape) <= _LARGE:
            updates = tuple(replace(update, wide=True) for update in tensor.updates)
            tensors[name] = replace(tensor, updates=updates)
    return replace(plan, tensors=tensors)


def _check_claims(file: AdapterFile, adapter: DiffusionAdapter) -> None:
    """Every tensor belongs to exactly one module, or is a vector of textual inversion, or is known to be zero."""
    claimed: set[str] = {*adapter.vectors, *adapter.unused}
    for module in adapter.modules:
        for key in (*module.keys.values(), *([module.alpha_key] if module.alpha_key else [])):
            if key in claimed:
                raise file.refuse("two modules claim this tensor", tensor=key, expected="one for each tensor")
            claimed.add(key)
    unused = file.tensors.keys() - claimed
    if unused:
        raise AdapterError(
            f"{len(unused)} of {len(file.tensors)} adapter tensors would not be used",
            where=file.folder,
            tensor=min(unused),
            expected="every tensor used",
        )
