"""A transformers class without weights: the tensors that it has, those that are one, and what files make of them.

The class that config.json names is built on the meta device, once for each configuration. Names are those of the
loaded model. Two names are tied where the built model has one parameter under both, whatever made them so.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from lora_export import meta_model
from lora_export.adapters.kind import Layer
from lora_export.checkpoint.reader import Checkpoint
from lora_export.errors import CheckpointError
from lora_export.merging.architecture.pieces import Group, Shape, StoredPiece, stored_piece

Keys = tuple[str, ...]  # on the way to a part of config.json
Numbers = Literal["float", "whole", "passed over"]
# Parameters for training alone: many files lack them, and no forward of a finished model reads them.
_TRAINING_ONLY = (".masked_spec_embed",)
_building = threading.Lock()


@dataclass(frozen=True)
class Architecture:
    """model: on the meta device."""

    model: Any

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of everything that a checkpoint of this model may hold."""
        return {name: tuple(t.shape) for name, t in self.model.state_dict().items()}

    @property
    def prefix(self) -> str:
        """Of the body in this class: "bert." for a BERT with a head, empty for the body itself."""
        own = str(self.model.base_model_prefix) + "."
        return own if own != "." and any(n.startswith(own) for n in self.shapes) else ""

    # --- what the model has -----------------------------------------------------------------------------------

    @cached_property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Names that share one weight, the source of a tie first."""
        sources = set((getattr(self.model, "all_tied_weights_keys", None) or {}).values())
        names: dict[int, list[str]] = {}
        for named_tensors in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in named_tensors(remove_duplicate=False):
                if name in self.shapes:
                    names.setdefault(id(tensor), []).append(name)
        return tuple(
            tuple(sorted(group, key=lambda n: n not in sources)) for group in names.values() if len(group) > 1
        )

    @cached_property
    def input_embedding(self) -> str | None:
        """The module that looks up tokens."""
        return self._name_of("get_input_embeddings")

    def _name_of(self, getter: str) -> str | None:
        module = None
        with contextlib.suppress(Exception):  # a model without one may raise anything
            module = getattr(self.model, getter)()
        if module is None:
            return None
        return next((name for name, m in self.model.named_modules(remove_duplicate=False) if m is module), None)

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Modules whose weights have a row for each token: the embeddings, the head, and what is tied to them."""
        modules = {m for m in (self.input_embedding, self._name_of("get_output_embeddings")) if m}
        for group in self.ties:
            owners = {name.rpartition(".")[0] for name in group}
            if owners & modules:
                modules |= owners
        return frozenset(modules)

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        """The modules with a weight, in the order of the model."""
        import torch

        modules = self.model.named_modules()
        return {n: _layer(m) for n, m in modules if isinstance(getattr(m, "weight", None), torch.Tensor)}

    def unfilled(self, names: Iterable[str]) -> list[str]:
        """What the class needs besides `names`, in its order; not what is tied to them or made by itself."""
        filled = set(names)
        filled |= {n for group in self.ties if not filled.isdisjoint(group) for n in group}
        filled |= {n for n, _ in self.model.named_buffers()}
        ignored = [re.compile(p) for p in getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()]
        return [
            name
            for name in self.shapes
            if name not in filled
            and not f".{name}".endswith(_TRAINING_ONLY)
            and not any(p.search(name) for p in ignored)
        ]

    # --- what its configuration says --------------------------------------------------------------------------

    @cached_property
    def text_settings(self) -> Keys:
        """Where in config.json the settings of the text model lie: () at the top."""
        config = self.model.config
        wanted = config.get_text_config()
        return next((keys for keys, part in _parts(config) if part is wanted), ())

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(json.dumps(self.model.config.to_dict(), default=str))
        return settings

    def scales_by_tie(self) -> bool:
        """Whether a forward pass computes something else where the configuration ties embeddings."""
        import inspect

        for cls in {type(m) for m in self.model.modules()}:
            with contextlib.suppress(OSError, TypeError):
                if "config.tie_word_embeddings" in inspect.getsource(cls.forward):
                    return True
        return False

    # --- what the names in files become -----------------------------------------------------------------------

    def becomes(self, stored: str) -> tuple[str, str | None]:
        """(the name in the loaded model of a tensor in a file, the pattern of the conversion that it undergoes)."""
        return self._conversions.becomes(stored)

    @cached_property
    def _conversions(self) -> "Conversions":
        return Conversions(self)

    def names_of(self, stored: str) -> list[str]:
        """The names in the loaded model of a tensor in a file, which may be cut into several weights."""
        name, pattern = self.becomes(stored)
        converters = self._conversions.converters
        targets = next((c.target_patterns for c in converters if pattern in c.source_patterns), [""])
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

    def loaded(self, weights: Mapping[str, Shape]) -> dict[str, tuple[StoredPiece, ...]]:
        """Name in the loaded model → the tensors on disk that make it. weights: name on disk → shape."""
        from transformers.core_model_loading import dot_natural_key

        table = Conversions(self)
        by_pattern = {p: c for c in table.converters for p in c.source_patterns}
        pieces, groups = dict[str, list[StoredPiece]](), dict[str, Group]()
        for name in sorted(weights, key=dot_natural_key):
            target, pattern = table.becomes(name)
            earlier = pieces.setdefault(target, [])
            piece = (
                StoredPiece(name) if pattern is None else stored_piece(name, pattern, by_pattern[pattern], earlier)
            )
            if piece is not None:
                earlier.append(piece)
            elif pattern is not None:
                sources = groups[target].sources if target in groups else {}
                groups[target] = Group({**sources, name: pattern}, target, by_pattern[pattern], self.model)
        loaded = {target: tuple(parts) for target, parts in pieces.items() if parts}
        for group in groups.values():
            try:
                shapes = group.shapes(weights)
            except Exception:  # tensors of other shapes than it expects: then there are no names for them
                continue
            for name, shape in shapes.items():
                loaded[name] = tuple(StoredPiece(source, group=group, loaded=shape) for source in group.sources)
        return loaded

    def numbers(self, names: Iterable[str]) -> dict[str, Numbers]:
        """Name of a tensor on disk → what the loaded model has for it, or that transformers knows it and passes it
        over; nothing for a tensor that it does not know."""
        table, tensors, kinds = Conversions(self), self.model.state_dict(), dict[str, Numbers]()
        passed_over = [*(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        for name in names:
            target = table.becomes(name)[0]
            if target in tensors:
                kinds[name] = "float" if tensors[target].is_floating_point() else "whole"
            elif any(re.search(pattern, name) for pattern in passed_over):
                kinds[name] = "passed over"
        return kinds

    def todays_names(self, names: Iterable[str]) -> dict[str, str]:
        """Older name → name in the loaded model, of those of `names` that transformers' renamings explain.

        transformers renames what it reads of older files, and an adapter's names are those of the model that it was
        trained in. A bias that the model lacks has the name of its layer.
        """
        from transformers.core_model_loading import dot_natural_key

        table, today = Conversions(self), dict[str, str]()
        table.converters.clear()

        def known(name: str) -> str | None:
            target = table.becomes(name)[0]
            return target if target in self.shapes else None

        # In the order in which a file is read: some renamings wait for the one that goes before.
        for name in sorted((n for n in names if n not in self.shapes), key=dot_natural_key):
            target = known(name)
            if target is None and name.endswith(".bias"):
                layer = known(f"{name.removesuffix('bias')}weight")
                target = layer and f"{layer.removesuffix('weight')}bias"
            if target is not None:
                today[name] = target
        return today


class Conversions:
    """What transformers does to names and tensors on loading. Made anew for each list of names, because some
    renamings remember the names that they have seen."""

    def __init__(self, architecture: Architecture) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        table = get_model_conversion_mapping(architecture.model)
        self.renamings = [c for c in table if isinstance(c, WeightRenaming)]
        self.converters = [c for c in table if isinstance(c, WeightConverter)]
        self._prefix, self._shapes = architecture.model.base_model_prefix, architecture.shapes

    def becomes(self, stored: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        names: Any = self._shapes  # of which only the keys are looked at
        renamed: tuple[str, str | None] = rename_source_key(
            stored, self.renamings, self.converters, self._prefix, names
        )
        return renamed


def _parts(config: Any, at: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    yield at, config
    for key in getattr(config, "sub_configs", None) or ():
        part = getattr(config, key, None)
        if part is not None and part is not config and hasattr(part, "to_dict"):
            yield from _parts(part, (*at, key))


def _layer(module: Any) -> Layer:
    import torch
    from transformers.pytorch_utils import Conv1D

    conv1d = isinstance(module, Conv1D)
    embedding = isinstance(module, torch.nn.Embedding)
    linear = conv1d or isinstance(module, torch.nn.Linear)
    return Layer(linear, embedding, tuple(module.weight.shape), conv1d, _scale(module) if embedding else 1.0)


def _scale(module: Any) -> float:
    """A buffer of a model without weights has no value: transformers keeps its number beside it. It is fp32's."""
    import torch

    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    if isinstance(scale, torch.Tensor):
        return 1.0 if scale.is_meta else float(scale)
    return (
        float(torch.tensor(scale, dtype=torch.float32)) if hasattr(module, "scalar_embed_scale") else float(scale)
    )


def token_modules(base: Checkpoint) -> frozenset[str]:
    """Modules of the base with a row for each token; empty where transformers cannot build it."""
    known = architecture_of(base)
    return known.vocabulary if known else frozenset()


def loaded_weights(base: Checkpoint, weights: Mapping[str, Shape]) -> dict[str, tuple[StoredPiece, ...]]:
    """As Architecture.loaded; empty where transformers cannot build the base."""
    known = architecture_of(base)
    return known.loaded(weights) if known else {}


def architecture_of(base: Checkpoint, changes: Mapping[str, Any] | None = None) -> Architecture | None:
    """The base's architecture, with changes of its configuration; None where transformers cannot build it."""
    try:
        return built(base, changes)
    except (CheckpointError, ImportError):
        return None


def built(base: Checkpoint, changes: Mapping[str, Any] | None = None) -> Architecture:
    """The same; CheckpointError where transformers cannot build it, ImportError where a library is missing."""
    wanted = dict(base.config) | dict(changes or {})
    wanted.pop("quantization_config", None)
    with _building:
        outcome = _built(base.folder, json.dumps(wanted))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@lru_cache(maxsize=8)  # the same few are asked for while a merge is planned
def _built(folder: Path, config: str) -> Architecture | CheckpointError | ImportError:
    try:
        return Architecture(meta_model.build(folder, json.loads(config)))
    except (CheckpointError, ImportError) as error:
        return error
