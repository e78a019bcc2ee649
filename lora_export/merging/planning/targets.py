"""Updates of adapters brought to the weights of a base.

An adapter has the names of the model that it was trained in, a base has names of tensors in files. The way from one
to the other, in order; of the steps, the first that knows a name decides:

- `resolve_prefix` (names.py): one change of prefix for all names, where a body has another prefix in a model with a
  head, or inside a vision-language model;
- `Architecture.todays_names`: names of an older transformers, for those that no file has;
- `as_stored`: the base stores a weight of this name;
- `one_expert` (weight_parts.py): the weight of a single expert, stored under its other name or inside a fused one;
- `split_projection`: a part of a projection that is stored as one weight;
- `as_loaded`: a weight that transformers makes of tensors on disk (architecture/pieces.py);
- `tied`: a weight that is not stored because it is tied to one that is;
- `left_out`: an optional bias that the layer does not have.

A name that no step knows is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.architecture.pieces import spread
from lora_export.merging.planning.base import BaseWeight
from lora_export.merging.planning.names import BaseNames, resolve_prefix, tied_head, unknown_target
from lora_export.merging.planning.weight_parts import one_expert, split_projection

# The update as updates of what the base stores; None where the step does not know the name.
Step = Callable[[TargetUpdate, BaseNames], list[TargetUpdate] | None]


def match_targets(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Mapping[str, BaseWeight]
) -> tuple[dict[str, list[TargetUpdate]], list[str]]:
    """(weight → its updates, replacements first; warnings). A tied head that is not stored is a weight, too."""
    targets: dict[str, list[TargetUpdate]] = {}
    warnings: list[str] = []
    shapes = {n: w.shape for n, w in weights.items()}
    for owner, adapter in enumerate(adapters):
        change = resolve_prefix((u.target for u in adapter.updates), weights)
        if any(change):
            warnings.append(f"names of {adapter.folder.name} were matched with a changed prefix: {change}")
        for update in _resolved(adapter, BaseNames(base, shapes, change)):
            targets.setdefault(update.target, []).append(replace(update, owner=owner))
    for name, updates in targets.items():
        updates.sort(key=lambda u: not u.replaces)
        if sum(u.replaces for u in updates) > 1:
            raise AdapterError(
                "two adapters replace this tensor", where=adapters[-1].folder, tensor=name, expected="one of them"
            )
    return targets, warnings


def _resolved(adapter: Adapter, names: BaseNames) -> list[TargetUpdate]:
    """The adapter's updates under the names of the files."""
    resolved: list[TargetUpdate] = []
    called: dict[str, str] = {}  # weight → what the adapter calls it
    older = [u.target for u in adapter.updates if names.stored(u.target) is None]
    today = names.architecture.todays_names(older) if older and names.architecture else {}
    for given in adapter.updates:
        update = replace(given, target=today[given.target]) if given.target in today else given
        name = names.stored(update.target)
        if name is not None and called.setdefault(name, update.target) != update.target:
            raise AdapterError(
                f"the adapter changes this weight under two names, {called[name]} and {update.target}",
                where=adapter.folder,
                tensor=name,
                expected="one name for each weight",
            )
        updates = next((u for u in (step(update, names) for step in STEPS) if u is not None), None)
        if updates is None:
            raise unknown_target(update.target, names.shapes, str(adapter.folder))
        resolved += updates
    return resolved


def as_stored(update: TargetUpdate, names: BaseNames) -> list[TargetUpdate] | None:
    name = names.stored(update.target)
    return None if name is None else [replace(update, target=name)]


def as_loaded(update: TargetUpdate, names: BaseNames) -> list[TargetUpdate] | None:
    pieces = names.loaded.get(update.target)
    return None if pieces is None else spread(update, pieces, names.shapes)


def tied(update: TargetUpdate, names: BaseNames) -> list[TargetUpdate] | None:
    known = names.architecture
    if known is None:
        return [update] if update.target == tied_head(names.shapes) else None
    called = (update.target, names.renamed(update.target), *known.loaded({update.target: ()}))
    groups = [group for group in known.ties if any(n in names.loaded for n in group)]
    name = next((n for n in called for group in groups if n in group), None)
    return None if name is None else [replace(update, target=name)]


def left_out(update: TargetUpdate, names: BaseNames) -> list[TargetUpdate] | None:
    weight = f"{update.target.rpartition('.')[0]}.weight"
    has_layer = names.stored(weight) is not None or weight in names.loaded
    return [] if update.optional and has_layer else None


STEPS: tuple[Step, ...] = (as_stored, one_expert, split_projection, as_loaded, tied, left_out)
