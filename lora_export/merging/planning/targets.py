"""Updates of adapters brought to the weights of a base: each finds its weight, or is refused."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.architecture.meta import Architecture, architecture_of
from lora_export.merging.planning.base import BaseWeight
from lora_export.merging.planning.loaded_names import Piece, spread
from lora_export.merging.planning.names import rename, resolve_prefix, tied_pair, unknown_target
from lora_export.merging.planning.older_names import with_todays_names
from lora_export.merging.planning.one_expert import on_disk
from lora_export.merging.planning.split_projections import on_rows


def match_targets(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Mapping[str, BaseWeight]
) -> tuple[dict[str, list[TargetUpdate]], list[str]]:
    """(weight → its updates, replacements first; warnings). A tied head that is not stored is a weight, too."""
    targets: dict[str, list[TargetUpdate]] = {}
    warnings: list[str] = []
    for owner, adapter in enumerate(adapters):
        change = resolve_prefix((u.target for u in adapter.updates), weights)
        if any(change):
            warnings.append(f"names of {adapter.folder.name} were matched with a changed prefix: {change}")
        for update in _resolved(base, adapter, weights, change):
            targets.setdefault(update.target, []).append(replace(update, owner=owner))
    for name, updates in targets.items():
        updates.sort(key=lambda u: not u.replaces)
        if sum(u.replaces for u in updates) > 1:
            raise AdapterError(
                "two adapters replace this tensor", where=adapters[-1].folder, tensor=name, expected="one of them"
            )
    return targets, warnings


def _resolved(
    base: Checkpoint, adapter: Adapter, weights: Mapping[str, BaseWeight], change: tuple[str, str]
) -> list[TargetUpdate]:
    """The adapter's updates under the names of the files; what transformers fuses on loading is taken apart."""
    found: list[TargetUpdate] = []
    called: dict[str, str] = {}  # weight → what the adapter calls it
    known: Architecture | None = None
    loaded: dict[str, tuple[Piece, ...]] | None = None
    shapes = {n: w.shape for n, w in weights.items()}
    for update in with_todays_names(base, list(adapter.updates), weights, change):
        name = next((n for n in (rename(update.target, change), update.target) if n in weights), None)
        if name is not None:
            if called.setdefault(name, update.target) != update.target:
                raise AdapterError(
                    f"the adapter changes this weight under two names, {called[name]} and {update.target}",
                    where=adapter.folder,
                    tensor=name,
                    expected="one name for each weight",
                )
            found.append(_renamed(update, name))
            continue
        part = on_disk(update, rename(update.target, change), shapes, base.model_types)
        part = part or on_rows(update, rename(update.target, change), shapes, base.config)
        if part is not None:
            found.append(part)
            continue
        if loaded is None:
            known = architecture_of(base)
            loaded = known.loaded(shapes) if known else {}
        tied = _tied_name(update, known, loaded, weights, change)
        if update.target in loaded:
            found += spread(update, loaded[update.target], shapes)
        elif tied is not None:
            found.append(_renamed(update, tied))
        elif not (update.optional and _has_weight(update, weights, loaded, change)):
            raise unknown_target(update.target, weights, str(adapter.folder))
    return found


def _has_weight(
    update: TargetUpdate,
    weights: Mapping[str, BaseWeight],
    loaded: Mapping[str, tuple[Piece, ...]],
    change: tuple[str, str],
) -> bool:
    """Whether the layer is there, though without the bias that this optional update is for."""
    weight = f"{update.target.rpartition('.')[0]}.weight"
    return weight in weights or weight in loaded or rename(weight, change) in weights


def _tied_name(
    update: TargetUpdate,
    known: Architecture | None,
    loaded: Mapping[str, object],
    weights: Collection[str],
    change: tuple[str, str],
) -> str | None:
    """The name of a weight that the base does not store because it is tied to one that it stores."""
    if known is None:
        pair = tied_pair(weights)
        return pair[1] if pair and update.target == pair[1] else None
    names = (update.target, rename(update.target, change), *known.loaded({update.target: ()}))
    groups = [group for group in known.ties if any(n in loaded for n in group)]
    return next((n for n in names for group in groups if n in group), None)


def _renamed(update: TargetUpdate, name: str) -> TargetUpdate:
    return update if update.target == name else replace(update, target=name)
