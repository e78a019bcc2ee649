"""Adapters of an older transformers: its names of modules, brought to those that the loaded model has now.

transformers renames what it reads of older files by a table of its own (transformers.conversion_mapping), and an
adapter's names are those of the model that it was trained in.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import TargetUpdate
from lora_export.merging.architecture.meta import architecture_of
from lora_export.merging.planning.names import rename


def with_todays_names(
    base: Checkpoint, updates: Sequence[TargetUpdate], weights: Collection[str], change: tuple[str, str]
) -> list[TargetUpdate]:
    """The updates, those for names that no file has under the name in the loaded model, if there is one.

    change: of prefix, as of resolve_prefix.
    """
    unknown = [u.target for u in updates if u.target not in weights and rename(u.target, change) not in weights]
    called = todays_names(base, unknown) if unknown else {}
    return [replace(u, target=called[u.target]) if u.target in called else u for u in updates]


def todays_names(base: Checkpoint, names: Collection[str]) -> dict[str, str]:
    """Older name → name in the loaded model, of those of `names` that transformers' table explains.

    A bias that the model lacks has the name of its layer.
    """
    architecture = architecture_of(base)  # which whoever resolves the names asks for as well
    if architecture is None:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    model, known = architecture.model, architecture.shapes
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]

    def today(name: str) -> str | None:
        found: str = rename_source_key(name, renamings, [], model.base_model_prefix, known)[0]
        return found if found in known else None

    called: dict[str, str] = {}
    # In the order in which a file is read: some renamings wait for the one that goes before.
    for name in sorted((n for n in names if n not in known), key=dot_natural_key):
        found = today(name)
        if found is None and name.endswith(".bias"):
            layer = today(f"{name.removesuffix('bias')}weight")
            found = layer and f"{layer.removesuffix('weight')}bias"
        if found is not None:
            called[name] = found
    return called
