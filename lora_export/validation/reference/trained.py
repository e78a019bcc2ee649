"""What training changed of the model: the class and head that the base is stored without, and the vocabulary.

The base's configuration and the adapters' own files decide it, so that a merged folder has no say in it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lora_export import meta_model as skeleton
from lora_export import tasks
from lora_export.contracts import AdapterChoice
from lora_export.errors import CheckpointError
from lora_export.storage.sealed import LARGEST_SETTINGS, read_json
from lora_export.validation.reference.files import START, adapter_config, headers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trained:
    """cls: the transformers class; changes: what its config.json says otherwise than the base's; model: of this
    class, without weights; heads: the tensors that the adapters bring."""

    cls: Any
    changes: Mapping[str, Any]
    model: Any
    heads: frozenset[str]

    def renamed(self, base: Collection[str], merged: Collection[str]) -> dict[str, str]:
        """Name in the merged file → name in the base's, of what the class has a use for.

        Both are read by transformers as the same tensor; the prefix of the body is what one has and the other not.
        """
        loaded = loaded_names(self.model, {*base, *merged})
        targets, prefix = {name: one[0] for name, one in loaded.items()}, f"{self.model.base_model_prefix}."
        state, renamed = self.model.state_dict(), dict[str, str]()
        for name in base:
            target = targets[name]
            if target in state and target not in self.heads:
                spellings = (name, prefix + name, name.removeprefix(prefix), target)
                same = (s for s in spellings if s in merged and targets[s] == target)
                renamed[next(same, name)] = name
        return renamed


def loaded_names(model: Any, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name of a tensor in a file → its names in the loaded model, by transformers' own conversions: several where
    it becomes several tensors."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    how = renamings, converters, model.base_model_prefix, model.state_dict()
    targets = {p: c.target_patterns for c in converters for p in c.source_patterns}
    names_of = {}
    for name in names:
        loaded, pattern = rename_source_key(name, *how)
        first, *others = targets.get(pattern, ("",)) if pattern else ("",)
        names_of[name] = (loaded, *(loaded.replace(first, other) for other in others))
    return names_of


def trained_as(base: Path, adapters: Sequence[AdapterChoice], task: str | None) -> Trained | None:
    """None where the base's own class has a place for every module that the adapters saved whole."""
    saved = _saved(adapters)
    stored = read_json(base / "config.json", limit=LARGEST_SETTINGS)
    if not saved:
        return None
    try:
        own = skeleton.build(base, stored)
    except CheckpointError:
        return None  # what transformers cannot build is refused by whoever loads it
    prefix = f"{own.base_model_prefix}."
    shapes = _shapes(own)
    known = {n: shapes.get(n) or shapes.get(prefix + n) or shapes.get(n.removeprefix(prefix)) for n in saved}
    heads = {name: shape for name, shape in saved.items() if known[name] != shape}
    new = {name: shape for name, shape in heads.items() if known[name] is None}
    if not heads:
        return None
    # Beside a new head, what is there already in another size is a vocabulary that was resized.
    wanted = new or heads
    for cls in _candidates(own, adapters, task):
        for changes in _settings(cls, stored, wanted):
            config = stored | {"architectures": [cls.__name__]} | changes
            try:
                model = skeleton.build(base, config)
            except CheckpointError:
                continue
            known_shapes = _shapes(model)
            if all(known_shapes.get(name) == shape for name, shape in wanted.items()):
                named = {"architectures": [cls.__name__]} | _labels(stored, config, adapters)
                return Trained(cls, changes | named, model, frozenset(wanted))
    return None


def _saved(adapters: Sequence[AdapterChoice]) -> dict[str, Shape]:
    """Name in the model → shape, of what lies in a module that modules_to_save names."""
    saved: dict[str, Shape] = {}
    for adapter in adapters:
        modules = adapter_config(adapter.folder).get("modules_to_save") or ()
        modules = tuple(m for m in modules if isinstance(m, str))
        for key, stored in headers(adapter.folder).items() if modules else ():
            name = key.removeprefix(START).replace(".modules_to_save", "")
            owners = name.split(".")[:-1]
            inside = any(".".join(owners[: i + 1]).endswith(modules) for i in range(len(owners)))
            if inside and ".original_module" not in key and "lora_" not in key:
                saved[name] = stored.shape
    return saved


def _shapes(model: Any) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _candidates(own: Any, adapters: Sequence[AdapterChoice], task: str | None) -> list[Any]:
    """By what names them: the adapters, the task asked for, the base itself, and any other task."""
    classes: list[Any] = []
    for adapter in adapters:
        config = adapter_config(adapter.folder)
        mapping = config.get("auto_mapping")
        classes.append(tasks.class_named(mapping.get("base_model_class") if isinstance(mapping, dict) else None))
        named = tasks.PEFT_TASKS.get(str(config.get("task_type")))
        classes += tasks.classes_of(named, own.config) if named else []
    classes += tasks.classes_of(task, own.config) if task else []
    classes.append(type(own))
    for other in tasks.TASKS:
        classes += tasks.classes_of(other, own.config)
    return [c for c in dict.fromkeys(classes) if c is not None and c.config_class is type(own.config)]


def _settings(cls: Any, stored: Mapping[str, Any], saved: Mapping[str, Shape]) -> Iterator[dict[str, Any]]:
    """The base's own settings, then those with as many labels, or letters, as a saved tensor has rows."""
    yield {}
    for size in sorted({shape[0] for shape in saved.values() if shape and shape[0] <= tasks.MOST_LABELS}):
        yield tasks.with_labels(stored, size)
        if cls.__name__.endswith("ForCTC"):
            yield {"vocab_size": size}


def _labels(
    stored: Mapping[str, Any], config: Mapping[str, Any], adapters: Sequence[AdapterChoice]
) -> dict[str, Any]:
    """Names of the labels that a file beside an adapter gives, for as many labels as the head has."""
    count = len(config["id2label"]) if "id2label" in config else 2
    for adapter in adapters:
        path = adapter.folder / "config.json"
        names = read_json(path, limit=LARGEST_SETTINGS).get("id2label") if path.is_file() else None
        if isinstance(names, dict) and set(names) == {str(i) for i in range(count)}:
            values = {int(i): name for i, name in names.items() if isinstance(name, str)}
            if len(set(values.values())) == count:
                return tasks.with_labels(stored, count, values)
    return {}


_SAVED, _DELTA = ".modules_to_save", ".trainable_tokens_delta"
_WHOLE = ("", ".modules_to_save", ".token_adapter", ".base_layer", ".token_adapter.base_layer", ".original_module")


def fit_vocabulary(model: Any, adapters: Sequence[AdapterChoice]) -> None:
    """Resize embeddings and head to the rows that the adapters' tensors have; the new rows come out of those."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # images and sounds have none
        return
    if getattr(embedding, "weight", None) is None or embedding.weight.is_meta:
        return
    rows = next((n for adapter in adapters for n in _rows(model, adapter)), None)
    if rows is not None and rows != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def saved_twice(key: str, adapters: Sequence[AdapterChoice]) -> bool:
    """Whether a tensor that PEFT has no place for is a copy of one that it has: where it saves embeddings beside
    the adapter, a saved module's weight is there under two names, and tied heads have the embedding's rows."""
    for tensors in (headers(adapter.folder) for adapter in adapters):
        if key not in tensors or not key.endswith((_DELTA, ".weight", ".bias")):
            continue
        copies = [key.replace(_SAVED, "")] if _SAVED in key else [n for n in tensors if n.endswith(_DELTA)]
        mine = tensors[key].read()
        if any(n != key and n in tensors and torch.equal(tensors[n].read(), mine) for n in copies):
            return True
    return False


def _rows(model: Any, adapter: AdapterChoice) -> Iterator[int]:
    """The number of rows, by what tells it best: whole weights, factors, the last token that was trained."""
    shapes = {key.removeprefix(START): t.shape for key, t in headers(adapter.folder).items()}
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m is inside or m is outside]
    for name, module in modules:
        if len(module.weight.shape) == 2:
            yield from (shapes[k][0] for w in _WHOLE if (k := f"{name}{w}.weight") in shapes)
    for name, module in modules:
        if f"{name}.lora_embedding_A" in shapes:
            yield shapes[f"{name}.lora_embedding_A"][1]
        if module is outside and f"{name}.lora_B.weight" in shapes:
            yield shapes[f"{name}.lora_B.weight"][0]
    last, rows = max(_tokens(adapter), default=-1), inside.weight.shape[0]
    for name, _ in modules:
        for key in (f"{name}.token_adapter.trainable_tokens_delta", f"{name}.trainable_tokens_delta"):
            if key in shapes and rows <= last < rows + shapes[key][0]:
                yield last + 1


def _tokens(adapter: AdapterChoice) -> Iterator[int]:
    config = adapter_config(adapter.folder)
    named: Any = config.get("token_indices") or config.get("trainable_token_indices") or ()
    for tokens in named.values() if isinstance(named, dict) else (named,):
        yield from (t for t in tokens if isinstance(t, int))
