"""Which class a head belongs to: the adapter or `--task` says so, and all tensors and shapes must agree."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_export import tasks
from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter, MergeOptions, TargetUpdate
from lora_export.errors import AdapterError, InputError
from lora_export.merging.architecture.model import Architecture, architecture_of

Fit = tuple[Architecture, dict[str, Any]]  # the class, and the changes of config.json for the head to fit


@dataclass(frozen=True)
class Lacking:
    """What an adapter stores whole and the base does not have, or has in another size."""

    adapter: Adapter
    updates: tuple[TargetUpdate, ...]
    absent: bool


@dataclass(frozen=True)
class ChosenClass:
    """changes: of config.json, without which the head would not fit; asked: whether it took --task to know it."""

    architecture: Architecture
    changes: dict[str, Any]
    asked: bool


def check_task(base: Checkpoint, options: MergeOptions) -> None:
    """Refuse a --task that the base's own class, which the result keeps, is not for."""
    if options.task is None:
        return
    own = tasks.class_named((base.config.get("architectures") or [None])[0])
    config = getattr(own, "config_class", None)
    wanted = tasks.classes_of(options.task, config()) if config else []
    if own not in wanted:
        raise InputError(
            f"--task {options.task}, but the adapter brings no head that the base lacks: the merged model stays a "
            f"{own.__name__ if own else 'model of its own class'}",
            where=base.folder,
            expected="--task for an adapter whose head the base does not have",
            next_step="the same command without --task",
        )


def choose(
    base: Checkpoint, own: Architecture, lacking: Sequence[Lacking], options: MergeOptions
) -> ChosenClass | None:
    """The class that the adapter was trained with. None where nothing shows that this is about a head."""
    first = lacking[0]
    named_classes = _named(own, [one.adapter for one in lacking])
    fitting = [f for f in (_fit(base, cls, lacking) for cls in named_classes) if f]
    if options.task is not None:
        wanted = tasks.classes_of(options.task, own.model.config)
        if fitting and type(fitting[0][0].model) not in wanted:
            raise InputError(
                f"--task {options.task}, but the adapter says that it was trained as {fitting[0][0].name}",
                where=first.adapter.folder,
                expected="the task of the training",
                next_step="the same command without --task",
            )
        fits = fitting or [f for f in (_fit(base, cls, lacking) for cls in wanted) if f]
        if not fits:
            raise _fits_not(base, first, wanted, f"--task {options.task}")
        return ChosenClass(*fits[0], asked=not fitting)
    if fitting:
        return ChosenClass(*fitting[0], asked=False)
    same = _fit(base, type(own.model), lacking)
    if same:
        return ChosenClass(*same, asked=False)
    if not any(one.absent for one in lacking):
        return None
    others = _search(base, own, lacking)
    if named_classes:
        raise _fits_not(base, first, named_classes, "the adapter's configuration", others)
    if len({f[0].name for f in others.values()}) > 1:
        raise InputError(
            "the adapter brings a head, but does not say for which task: "
            + ", ".join(sorted({f[0].name for f in others.values()}))
            + " all have a place for it",
            where=first.adapter.folder,
            tensor=first.updates[0].target,
            expected="task_type or auto_mapping in adapter_config.json, or --task",
            next_step=" or ".join(f"--task {task}" for task in others),
        )
    return ChosenClass(*next(iter(others.values())), asked=False) if others else None


def _named(own: Architecture, adapters: Iterable[Adapter]) -> list[Any]:
    """Those classes named in the adapters' configurations that fit this base's configuration."""
    classes: list[Any] = []
    for adapter in adapters:
        mapping = adapter.config.get("auto_mapping")
        cls = tasks.class_named(mapping.get("base_model_class") if isinstance(mapping, dict) else None)
        if cls is not None and getattr(cls, "config_class", None) is type(own.model.config):
            classes.append(cls)
        task = tasks.PEFT_TASKS.get(str(adapter.config.get("task_type")))
        classes += tasks.classes_of(task, own.model.config) if task else []
    return list(dict.fromkeys(classes))


def _search(base: Checkpoint, own: Architecture, lacking: Sequence[Lacking]) -> dict[str, Fit]:
    """Task → its class, for all tasks whose class for this base fits the adapter."""
    fitting, tried = {}, dict[str, Fit | None]()
    for task in tasks.TASKS:
        for cls in tasks.classes_of(task, own.model.config):
            if cls.__name__ not in tried:
                tried[cls.__name__] = _fit(base, cls, lacking)
            fit = tried[cls.__name__]
            if fit and task not in fitting:
                fitting[task] = fit
    return fitting


def _fit(base: Checkpoint, cls: Any, lacking: Sequence[Lacking]) -> Fit | None:
    """(the class without weights, the changes of config.json) if it has a place for all that the adapters change.

    The number of labels (of a CTC model, of letters) is one of the sizes that the saved head has.
    """
    sizes = {u.shapes[0][0] for one in lacking for u in one.updates if u.shapes[0]}
    variants: list[dict[str, Any]] = [{}]
    for size in sorted(n for n in sizes if n and n <= tasks.MOST_LABELS):
        variants.append(tasks.with_labels(base.config, size))
        if cls.__name__.endswith("ForCTC"):
            variants.append({"vocab_size": size})
    for changes in variants:
        known = architecture_of(base, {"architectures": [cls.__name__]} | changes)
        if known is not None and all(_has(known, one) for one in lacking):
            return known, changes
    return None


def _has(known: Architecture, one: Lacking) -> bool:
    heads = {u.target for u in one.updates}
    for update in one.adapter.updates:
        name = known.place(update.target)
        if name is None:
            weight = known.place(f"{update.target.rpartition('.')[0]}.weight")
            # Experts that an adapter names one by one are told apart later, by what is stored.
            if not (update.optional and weight) and ".experts." not in update.target:
                return False
        elif update.target in heads and not update.fits(known.shapes[name]):
            return False
    return True


def _fits_not(
    base: Checkpoint,
    one: Lacking,
    classes: Sequence[Any],
    who: str,
    others: Mapping[str, Fit] | None = None,
) -> AdapterError:
    named = " or ".join(c.__name__ for c in classes) or f"no class for a {base.config.get('model_type')}"
    helps = " or ".join(f"--task {task}" for task in others or ())
    return AdapterError(
        f"{who} means {named}, which has no place for a tensor that the adapter brings",
        where=one.adapter.folder,
        tensor=one.updates[0].target,
        expected="the class that the adapter was trained with",
        next_step=f"the same command with {helps}" if helps else "give the base that it was trained on as -b",
    )
