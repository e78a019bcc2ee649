"""A head that the base does not have: the merged model gets the class that the adapter was trained with.

PEFT saves a new classifier, tagger or scorer whole (modules_to_save). The class comes from the adapter's task_type
or auto_mapping, or from `--task`, and is used only if it has all that the adapter changes, in the shapes of the
file. Its weights are the base's under the names of that class, and the head is the adapter's. What neither has
would be random numbers, and is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from lora_export import tasks
from lora_export.checkpoint.reader import Checkpoint
from lora_export.checkpoint.tensor_files import FILES
from lora_export.contracts import Adapter, MergeOptions, TargetUpdate, TensorInfo
from lora_export.errors import AdapterError, CheckpointError
from lora_export.merging.architecture.model import Architecture, architecture_of
from lora_export.merging.planning.base import BaseWeight
from lora_export.merging.planning.head_class import ChosenClass, Lacking, check_task, choose
from lora_export.merging.planning.names import INPUT_EMBEDDINGS, OUTPUT_HEADS, tied_head
from lora_export.merging.planning.replication import config_changes
from lora_export.storage.sealed import LARGEST_SETTINGS, read_json

_FLOATS = ("F64", "F32", "F16", "BF16")
_LABELLED = ("Classification", "ClassificationWithTeacher", "Segmentation")


@dataclass(frozen=True)
class NewModel:
    """The class of the output where it is not the base's, or has other labels.

    labels: how many, None where the class has none; left_out: the base's tensors that it does not use, also in
    words; brought: the tensors that come whole from the adapter; asked: whether it took `--task` to know the class.
    """

    architecture: str
    labels: int | None
    left_out: tuple[str, ...]
    brought: tuple[str, ...]
    asked: bool = False
    words_left_out: str = ""

    @property
    def words(self) -> str:
        labels = "" if self.labels is None else f", {self.labels} label{'s' if self.labels != 1 else ''}"
        return f"{self.architecture}{labels}" + (f"; left out: {self.words_left_out}" if self.left_out else "")


@dataclass(frozen=True)
class Remodelled:
    """What the rest of the plan works with. base: with the new configuration; changes: of config.json."""

    model: NewModel
    base: Checkpoint
    weights: dict[str, BaseWeight]
    adapters: list[Adapter]
    changes: dict[str, Any]
    warnings: list[str]


def remodelled(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Mapping[str, BaseWeight],
    options: MergeOptions,
    order: Sequence[int] | None,
) -> Remodelled | None:
    """None where the base's own class holds all that the adapters bring. order: of replicated layers.

    AdapterError and InputError where the class cannot be known, or would not be whole.
    """
    if order:
        base = replace(base, config={**base.config, **config_changes(base.config, order)})
    suspects = [(a, _suspects(a, weights)) for a in adapters]
    if not any(updates for _, updates in suspects):
        if adapters:
            check_task(base, options)
        return None
    own = architecture_of(base)
    if own is None:
        return None  # only the base's own names are known, and the adapter's are refused by them
    lacking = [one for a, updates in suspects if (one := _lacking(a, updates, own, weights))]
    if not lacking:
        check_task(base, options)
        return None
    chosen = choose(base, own, lacking, options)
    return None if chosen is None else _arrange(base, chosen, lacking, adapters, weights)


def _suspects(adapter: Adapter, weights: Mapping[str, BaseWeight]) -> list[TargetUpdate]:
    """Modules saved whole for which the base has no weight of this name and shape, judged by names alone."""
    tied, suspects = tied_head(weights), []
    for update in adapter.updates:
        name = update.target
        if not update.replaces or update.kind != "modules_to_save" or name == tied:
            continue
        resizable = name in (*INPUT_EMBEDDINGS, *OUTPUT_HEADS)
        if name not in weights or not (update.fits(weights[name].shape) or resizable):
            suspects.append(update)
    return suspects


def _lacking(
    adapter: Adapter, suspects: Sequence[TargetUpdate], own: Architecture, weights: Mapping[str, BaseWeight]
) -> Lacking | None:
    """The suspects for which the base's own class has no tensor, or one of another shape."""
    stored = {name for file in weights for name in own.names_of(file)}
    stored |= {name for group in own.ties for name in group}  # a tied head is not in the file, yet the base has it
    places = {u.target: own.place(u.target) for u in suspects}
    absent = [u for u in suspects if places[u.target] not in stored]
    misfits = [u for u in suspects if u in absent or not u.fits(own.shapes[places[u.target] or ""])]
    return Lacking(adapter, tuple(misfits), bool(absent)) if misfits else None


def _arrange(
    base: Checkpoint,
    chosen: ChosenClass,
    lacking: Sequence[Lacking],
    adapters: Sequence[Adapter],
    weights: Mapping[str, BaseWeight],
) -> Remodelled:
    """The base's weights under the names of the class, the adapters' heads beside them; the rest is left out."""
    new, name = chosen.architecture, chosen.architecture.name
    heads = {new.place(u.target) or u.target for one in lacking for u in one.updates}
    replaced = {new.place(u.target) for a in adapters for u in a.updates if u.replaces}
    kept, left_out, there = dict[str, BaseWeight](), list[str](), set[str]()
    for stored, weight in weights.items():
        target, conversion = new.becomes(stored)
        if target not in new.shapes:
            left_out.append(stored)
            continue
        other_size = conversion is None and weight.shape != new.shapes[target] and target not in replaced
        if target in heads or other_size:
            continue
        written = new.written(stored)
        if written is None or written in kept:
            raise CheckpointError(
                f"this tensor of the base has no name of its own in a {name}", where=base.folder, tensor=stored
            )
        kept[written] = weight
        there.update(new.names_of(stored))
    _refuse_random(new, new.unfilled(there | heads), heads, lacking[0].adapter)
    kept |= _brought(new, lacking, weights)
    changes, warnings = head_config(base, new, chosen.changes, adapters)
    words = listed(left_out, weights.keys() - set(left_out))
    model = NewModel(name, labels_of(new), tuple(left_out), tuple(sorted(heads)), chosen.asked, words)
    if left_out:
        warnings.append(f"a {name} does not use these tensors of the base, which are left out: {words}")
    return Remodelled(
        model,
        replace(base, config={**base.config, **changes}),
        kept,
        [_retargeted(a, new, any(a is one.adapter for one in lacking)) for a in adapters],
        changes,
        warnings,
    )


def _refuse_random(new: Architecture, missing: Sequence[str], heads: Iterable[str], adapter: Adapter) -> None:
    if not missing:
        return
    body = new.prefix
    modules = sorted({n.removeprefix(body).partition(".")[0] for n in (missing[0], *heads)})
    raise AdapterError(
        f"a {new.name} needs this weight, and neither base nor adapter has it: training initialized it with random "
        "numbers, which were not saved",
        where=adapter.folder,
        tensor=missing[0],
        expected="every weight of the merged model in one of the two",
        next_step=f"train with modules_to_save={modules!r}, or give a base that has this weight".replace("'", '"'),
    )


def _brought(
    new: Architecture, lacking: Sequence[Lacking], weights: Mapping[str, BaseWeight]
) -> dict[str, BaseWeight]:
    """The heads, in the last file of the base and in the type of most of its numbers.

    Whole numbers (BatchNorm's count of steps) are copied from the adapter's file.
    """
    sizes: dict[str, int] = {}
    for weight in weights.values():
        if weight.dtype in _FLOATS:
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + prod(weight.shape)
    dtype = max(sizes, key=lambda d: sizes[d]) if sizes else "F32"
    home, heads = list(weights.values())[-1].info.file, dict[str, BaseWeight]()
    for one in lacking:
        for update in one.updates:
            name = new.place(update.target) or update.target
            info = one.adapter.tensors[update.keys[0]]
            known = info.dtype in _FLOATS
            if known:
                info = TensorInfo(name, dtype, new.shapes[name], home, 0, 0, FILES)
            heads[name] = BaseWeight(name, new.shapes[name], info, brought=known, home=home)
    return dict(sorted(heads.items()))


def listed(names: Sequence[str], kept: Iterable[str] = ()) -> str:
    """Tensors by their modules: `cls.predictions.* (6)`. kept: names that none of the modules may have."""
    groups: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        shorter = [".".join(parts[:i]) + "." for i in range(1, len(parts))]
        module = next((m for m in shorter if not any(k.startswith(m) for k in kept)), name)
        groups[module] = groups.get(module, 0) + 1
    return ", ".join(f"{m}* ({n})" if m.endswith(".") else m for m, n in groups.items())


def _retargeted(adapter: Adapter, new: Architecture, owner: bool) -> Adapter:
    """The updates under the names of the class; whole numbers, which are copied, are none."""
    if not owner:
        return adapter
    updates = []
    for update in adapter.updates:
        name = new.place(update.target)
        if update.replaces and adapter.tensors[update.keys[0]].dtype not in _FLOATS:
            continue
        updates.append(update if name is None else replace(update, target=name))
    return replace(adapter, updates=tuple(updates))


def labels_of(new: Architecture) -> int | None:
    """How many labels the class has with its configuration; None for a class without labels."""
    return int(new.model.config.num_labels) if new.name.endswith(_LABELLED) else None


def head_config(
    base: Checkpoint, new: Architecture, changes: Mapping[str, Any], adapters: Sequence[Adapter]
) -> tuple[dict[str, Any], list[str]]:
    """(the keys of config.json that change, warnings). changes: those without which the head would not fit.

    Names of labels are those of a config.json beside the adapter, or the base's if there are as many.
    """
    keys: dict[str, Any] = {"architectures": [new.name], **changes}
    warnings, labels = [], labels_of(new)
    if labels is not None:
        own = next((n for n in (_names(_beside(a), labels) for a in adapters) if n), None)
        if own:
            keys |= tasks.with_labels(base.config, labels, own)
        elif labels > 1 and not _names(base.config, labels):
            warnings.append(
                f"no file of the adapter names the labels: they are called LABEL_0 … LABEL_{labels - 1}; "
                "id2label and label2id of config.json hold the names"
            )
    if "score.weight" in new.shapes and base.config.get("pad_token_id") is None:
        warnings.append(
            f"config.json has no pad_token_id: a {new.name} refuses more than one text at a time without it; "
            "set it to the value that training used"
        )
    return {k: v for k, v in keys.items() if base.config.get(k) != v}, warnings


def _beside(adapter: Adapter) -> Mapping[str, Any]:
    path = adapter.folder / "config.json"
    return read_json(path, limit=LARGEST_SETTINGS) if path.is_file() else {}


def _names(config: Mapping[str, Any], count: int) -> dict[int, str] | None:
    """Label → name, if the configuration has exactly so many, each with a name of its own."""
    names = config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(count)}:
        return None
    called = {int(i): name for i, name in names.items() if isinstance(name, str)}
    return called if len(set(called.values())) == count else None
