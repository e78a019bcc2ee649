"""A transformers class without weights: which tensors it has, and which of them a tensor in a file becomes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export import meta_model as skeleton

Shape = tuple[int, ...]
# Parameters that take part in training alone: many files lack them, and no forward of a finished model reads them.
_TRAINING_ONLY = (".masked_spec_embed",)


@dataclass(frozen=True)
class Outline:
    """shapes: of everything that the class has, by its name in the loaded model; buffers: those that no training
    changes and the class makes itself; tied: name → the one that shares its numbers."""

    model: Any
    shapes: Mapping[str, Shape]
    buffers: frozenset[str]
    tied: Mapping[str, str]
    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def prefix(self) -> str:
        """Of the body in this class: "bert." for a BERT with a head, empty for the body itself."""
        own = str(self.model.base_model_prefix) + "."
        return own if own != "." and any(n.startswith(own) for n in self.shapes) else ""

    def becomes(self, stored: str) -> tuple[str, str | None]:
        """(the name in the loaded model of a tensor in a file, the conversion that it goes through)."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters = list(self.renamings), list(self.converters)
        shapes: Any = self.shapes
        found: tuple[str, str | None] = rename_source_key(
            stored, renamings, converters, self.model.base_model_prefix, shapes
        )
        return found

    def names_of(self, stored: str) -> list[str]:
        """The names in the loaded model of a tensor in a file that becomes one weight, or is taken apart."""
        name, pattern = self.becomes(stored)
        targets = next((c.target_patterns for c in self.converters if pattern in c.source_patterns), [""])
        return [name, *(name.replace(targets[0], other) for other in targets[1:])]

    def place(self, target: str) -> str | None:
        """The name here of what an adapter calls `target`: the same, or what transformers has renamed it to."""
        return next((n for n in (target, self.becomes(target)[0]) if n in self.shapes), None)

    def written(self, stored: str) -> str | None:
        """The name that a base's tensor has in a file of this class; None if no such file would be read as it is.

        transformers keeps the spelling of what it has loaded; only the prefix of the body comes or goes.
        """
        meant, prefix = self.becomes(stored), str(self.model.base_model_prefix) + "."
        if meant[0].startswith(prefix):
            candidates = [stored if stored.startswith(prefix) else prefix + stored, stored, meant[0]]
        else:
            candidates = [stored.removeprefix(prefix), stored, meant[0]]
        return next((n for n in candidates if self.becomes(n) == meant), None)

    def missing(self, known: Iterable[str]) -> list[str]:
        """What the class needs beside `known`, in its order: nothing tied, nothing that it makes itself."""
        there = set(known)
        both = [*self.tied.items(), *((b, a) for a, b in self.tied.items())]
        there |= {a for a, b in both if b in there}
        ignored = [re.compile(p) for p in self.model._keys_to_ignore_on_load_missing or ()]
        return [
            name
            for name in self.shapes
            if name not in there
            and name not in self.buffers
            and not f".{name}".endswith(_TRAINING_ONLY)
            and not any(p.search(name) for p in ignored)
        ]


def outline(folder: Path, config: Mapping[str, Any]) -> Outline:
    """The class that `config` describes. CheckpointError where transformers cannot build it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    model = skeleton.build(folder, config)
    conversions = get_model_conversion_mapping(model)
    return Outline(
        model,
        {name: tuple(value.shape) for name, value in model.state_dict().items()},
        frozenset(name for name, _ in model.named_buffers()),
        dict(getattr(model, "all_tied_weights_keys", None) or {}),
        tuple(c for c in conversions if isinstance(c, WeightRenaming)),
        tuple(c for c in conversions if isinstance(c, WeightConverter)),
    )
