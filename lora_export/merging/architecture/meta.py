"""What the architecture itself says of a base: its names, its shapes, and which of its weights are one.

The class that config.json names is built on the meta device, without a weight. Two names are tied where the built
model has one parameter under both, whatever made them so.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lora_export import meta_model as skeleton
from lora_export.checkpoint.reader import Checkpoint
from lora_export.errors import CheckpointError
from lora_export.merging.planning.loaded_names import Piece, Shape, loaded_by

Path_ = tuple[str, ...]  # of keys in config.json


@dataclass(frozen=True)
class Architecture:
    """model: on the meta device. Names are those of the loaded model."""

    model: Any

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of everything that a checkpoint of this model may hold."""
        return {name: tuple(t.shape) for name, t in self.model.state_dict().items()}

    @cached_property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Names that share one weight, the source of a tie first."""
        sources = set((getattr(self.model, "all_tied_weights_keys", None) or {}).values())
        names: dict[int, list[str]] = {}
        for name, tensor in self._named():
            if name in self.shapes:
                names.setdefault(id(tensor), []).append(name)
        return tuple(
            tuple(sorted(group, key=lambda n: n not in sources)) for group in names.values() if len(group) > 1
        )

    def _named(self) -> Iterator[tuple[str, Any]]:
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)

    @cached_property
    def input_embedding(self) -> str | None:
        """The module that looks up tokens."""
        return self._name_of("get_input_embeddings")

    @cached_property
    def output_head(self) -> str | None:
        return self._name_of("get_output_embeddings")

    def _name_of(self, getter: str) -> str | None:
        found = None
        with contextlib.suppress(Exception):  # a model without one may raise anything
            found = getattr(self.model, getter)()
        if found is None:
            return None
        return next((name for name, m in self.model.named_modules(remove_duplicate=False) if m is found), None)

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Modules whose weights have a row for each token: the embeddings, the head, and what is tied to them."""
        modules = {m for m in (self.input_embedding, self.output_head) if m}
        for group in self.ties:
            owners = {name.rpartition(".")[0] for name in group}
            if owners & modules:
                modules |= owners
        return frozenset(modules)

    def loaded(self, weights: Mapping[str, Shape]) -> dict[str, tuple[Piece, ...]]:
        """Name in the model → the tensors on disk that make it. weights: name on disk → shape."""
        return loaded_by(self.model, weights)

    def unfilled(self, loaded: Mapping[str, object]) -> set[str]:
        """Names that neither a file nor a tie fills. loaded: what the files hold, by names of the model."""
        tied = {n for group in self.ties if any(n in loaded for n in group) for n in group}
        ignored = [re.compile(p) for p in getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()]
        missing = self.shapes.keys() - loaded.keys() - tied
        return {n for n in missing if not any(p.search(n) for p in ignored)}

    @cached_property
    def text_settings(self) -> Path_:
        """Where in config.json the settings of the text model lie: () at the top."""
        config = self.model.config
        wanted = config.get_text_config()
        return next((path for path, part in _parts(config) if part is wanted), ())

    def scales_by_tie(self) -> bool:
        """Whether a forward pass computes something else where the configuration ties embeddings."""
        import inspect

        for cls in {type(m) for m in self.model.modules()}:
            with contextlib.suppress(OSError, TypeError):
                if "config.tie_word_embeddings" in inspect.getsource(cls.forward):
                    return True
        return False

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(self.model.config.to_dict(), default=str))
        return found


def _parts(config: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    yield path, config
    for key in getattr(config, "sub_configs", None) or ():
        part = getattr(config, key, None)
        if part is not None and part is not config and hasattr(part, "to_dict"):
            yield from _parts(part, (*path, key))


def token_modules(base: Checkpoint) -> frozenset[str]:
    """Modules of the base with a row for each token; empty where transformers cannot build it."""
    known = architecture_of(base)
    return known.vocabulary if known else frozenset()


def architecture_of(base: Checkpoint, changes: Mapping[str, Any] | None = None) -> Architecture | None:
    """The base's architecture, with changes of its configuration; None where transformers cannot build it."""
    wanted = dict(base.config) | dict(changes or {})
    wanted.pop("quantization_config", None)
    return _built(base.folder, json.dumps(wanted))


@lru_cache(maxsize=8)  # the same few are asked for while a merge is planned
def _built(folder: Path, config: str) -> Architecture | None:
    try:
        return Architecture(skeleton.build(folder, json.loads(config)))
    except (CheckpointError, ImportError):
        return None
