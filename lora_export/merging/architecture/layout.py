"""The output where weights are tied or the vocabulary changes, held against the class that will load it.

The class is built with the changed settings, without weights: every name of it must be filled by the output, in its
shape, and what has to differ must not be one weight there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.architecture import vocabulary
from lora_export.merging.architecture.meta import Architecture
from lora_export.merging.architecture.settings import side_effects
from lora_export.merging.planning.base import BaseWeight
from lora_export.merging.planning.loaded_names import Piece, Shape
from lora_export.merging.planning.ties import Shared

_PADDED = "final_logits_bias"  # of BART and its kin: transformers fills it with zeros


@dataclass
class Layout:
    """targets: name in the output → updates; added: name that the base has not → its weight that it begins as;
    shapes: of what is resized; config: keys of config.json to set."""

    targets: dict[str, list[TargetUpdate]]
    added: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """What is changed, of what. known, on_disk: the base's architecture, and name in it → the tensors that make it;
    groups: all weights that several names share; apart: those of which the names must differ from now on."""

    base: Checkpoint
    weights: Mapping[str, BaseWeight]
    adapters: Sequence[Adapter]
    layout: Layout
    groups: Sequence[Shared]
    apart: Sequence[Shared]
    known: Architecture
    on_disk: Mapping[str, tuple[Piece, ...]]


class Proof:
    """The output against the class, built with changed settings.

    filled: names that were tied and are not any more, which the output needs, too → the base's weight; kept:
    tensors that transformers cuts, or fills with zeros; still_tied: names that must differ, and are one weight.
    """

    def __init__(self, change: Change, built: Architecture) -> None:
        self.change, self.known, self.on_disk, self.built = change, change.known, change.on_disk, built
        self.filled: dict[str, str] = {}
        self.kept: dict[str, Shape] = {}
        self.still_tied = self._still_tied()
        layout = change.layout
        self.outputs = {n: layout.shapes.get(n, w.shape) for n, w in change.weights.items()}
        self.outputs |= {
            n: layout.shapes.get(n, change.weights[source].shape) for n, source in layout.added.items()
        }
        missing = built.unfilled(built.loaded(self.outputs))
        for group in change.groups:
            for member in group.members:
                if member.model in missing and member.name not in self.outputs:
                    self.filled[member.name] = group.source
        self.outputs |= {n: self._shape_like(source) for n, source in self.filled.items()}
        self.loaded = built.loaded(self.outputs)

    def complete(self) -> None:
        """Give the names that were tied, and are not any more, what the name that is stored gets; cut, and pad."""
        layout = self.change.layout
        for name, source in self.filled.items():
            layout.added[name] = source
            if source in layout.targets:
                layout.targets[name] = list(layout.targets[source])
            if source in layout.shapes:
                layout.shapes[name] = layout.shapes[source]
        for name, shape in self.kept.items():
            layout.shapes[name] = shape
            if name not in layout.targets:
                layout.targets[name] = [vocabulary.kept(name, shape)]

    def _shape_like(self, source: str) -> Shape:
        return self.change.layout.shapes.get(source, self.change.weights[source].shape)

    def _still_tied(self) -> set[str]:
        found: set[str] = set()
        for group in self.change.apart:
            does = {m.model: _what(u) for m, u in zip(group.members, group.updates, strict=True)}
            for tie in self.built.ties:
                mine = [n for n in tie if n in does]
                if len({does[n] for n in mine}) > 1:
                    found |= set(mine)
        return found

    def error(self, by_files: bool) -> AdapterError | None:
        """None if this is a complete model that computes what PEFT's does.

        by_files: the configuration still ties, as transformers 5 does not with two names stored that differ.
        """
        if self.still_tied and not by_files:
            return self._refused("the weight stays tied", min(self.still_tied))
        if self.change.apart and not by_files and self.known.scales_by_tie():
            return self._refused("the class computes something else without ties", None)
        if side_effects(self.known.settings(), self.built.settings()):
            return self._refused("other settings would change", None)
        missing = self.built.unfilled(self.loaded) - self.known.unfilled(self.on_disk)
        if missing:
            return self._refused(f"{len(missing)} weights of the class would be missing", min(missing))
        excess = self.loaded.keys() - self.built.shapes.keys() - (self.on_disk.keys() - self.known.shapes.keys())
        if excess:
            return self._refused("the class has no place for a weight", min(excess))
        return self._misshapen()

    def _misshapen(self) -> AdapterError | None:
        for model, pieces in self.loaded.items():
            wanted, piece = self.built.shapes.get(model), pieces[0]
            if len(pieces) > 1 or piece.expert is not None or piece.transposed or wanted is None:
                continue
            found = self.outputs[piece.name]
            if found == wanted or self._misshapen_before(piece.name, model):
                continue
            fewer = len(found) == len(wanted) and all(w <= f for f, w in zip(found, wanted, strict=True))
            if fewer or model.rpartition(".")[2] == _PADDED:
                self.kept[piece.name] = wanted
            elif len(found) == len(wanted) and found[1:] == wanted[1:]:
                return vocabulary.rows_missing(piece.name, found[0], wanted[0], self.change.adapters)
            else:
                return self._refused(f"the class has the shape {list(wanted)}, not {list(found)}", piece.name)
        return None

    def _misshapen_before(self, name: str, model: str) -> bool:
        stored = self.change.weights.get(name)
        same = self.outputs[name] == stored.shape if stored else False
        return same and stored is not None and self.known.shapes.get(model) != stored.shape

    def _refused(self, why: str, tensor: str | None) -> AdapterError:
        untied = " and ".join(sorted({m.name for g in self.change.apart for m in g.members}))
        what = f"the adapter changes {untied} in different ways, and the base has one weight for them"
        if not untied:
            what = "the vocabulary has another size"
        return AdapterError(
            f"{what}; with a configuration for that, {why}",
            where=self.change.base.folder,
            tensor=tensor,
            expected=f"a model of the class {type(self.known.model).__name__} that can hold the result",
            next_step="serve it unmerged with PEFT, or train with ensure_weight_tying=True",
        )


def _what(updates: Sequence[TargetUpdate]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    return tuple((u.owner, u.keys) for u in updates)
