"""The output where weights are tied or the vocabulary changes: its names, its shapes, its settings, proved.

The class is built again with the changed settings, without weights: every name of it must be filled by the output,
in its shape. What cannot be shown so is refused.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging import vocabulary
from lora_export.merging.architecture import Architecture, architecture_of
from lora_export.merging.base import BaseWeight
from lora_export.merging.loaded import Piece, Shape
from lora_export.merging.names import INPUT_EMBEDDINGS, OUTPUT_HEADS
from lora_export.merging.settings import TIE, resizings, side_effects, untyings
from lora_export.merging.ties import Shared, changed, may_be_shared, shared_by_usual_names, shared_weights

_PADDED = "final_logits_bias"  # BART's and its kin's: transformers fills it with zeros


@dataclass
class Layout:
    """targets: name in the output → updates; added: name that the base has not → its weight that it begins as;
    shapes: of what is resized; config: keys of config.json to set."""

    targets: dict[str, list[TargetUpdate]]
    added: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def settle(
    base: Checkpoint,
    weights: Mapping[str, BaseWeight],
    targets: Mapping[str, list[TargetUpdate]],
    adapters: Sequence[Adapter],
    changes: Mapping[str, Any],
) -> Layout:
    """What the updates of `targets` make of ties and vocabulary. AdapterError where no model would be complete.

    changes: of the configuration, for other reasons.
    """
    layout = Layout(dict(targets))
    if not may_be_shared(targets, weights):
        return layout
    known = architecture_of(base, changes)
    on_disk = known.loaded({n: w.shape for n, w in weights.items()}) if known else {}
    groups = shared_weights(known, on_disk) if known else shared_by_usual_names(base, weights)
    touched = changed(groups, targets, weights, adapters, known)
    for group in touched:
        _spread(group, layout)
    heads = _heads_without_bias(known, on_disk, touched, layout) if known else {}
    for name, head in heads.items():
        layout.targets[name] = [vocabulary.no_bias(name)]
        layout.warnings.append(
            f"PEFT computes {head} without its bias where tokens of it are trained or it is saved tied, so {name} "
            "is zero in the merged model"
        )
    _resize(base, weights, layout, adapters, _rows_of_tokens(known, on_disk), heads)
    apart = [g for g in touched if not g.alike]
    if apart or layout.shapes:
        search = _Search(base, weights, adapters, dict(base.config) | dict(changes), layout, groups, apart)
        if known:
            search.by_architecture(known, on_disk)
        else:
            search.by_usual_keys()
    return layout


def _spread(group: Shared, layout: Layout) -> None:
    """What becomes of a shared weight under each of its names; of one that stays shared, under the stored ones."""
    for member, updates in zip(group.members, group.updates, strict=True):
        layout.targets.pop(member.name, None)
        if member.stored or not group.alike:
            if not member.stored:
                layout.added[member.name] = group.source
            if updates:
                layout.targets[member.name] = list(updates)


def _heads_without_bias(
    known: Architecture, on_disk: Mapping[str, tuple[Piece, ...]], touched: Sequence[Shared], layout: Layout
) -> dict[str, str]:
    """Stored bias → its head. TrainableTokensLayer calls F.linear without a bias; ensure_weight_tying saves a head
    as a new Linear without one (peft/tuners/trainable_tokens/layer.py, peft/utils/other.py)."""
    from torch.nn import Linear

    model_names = {pieces[0].name: name for name, pieces in on_disk.items()}
    changes = [(model_names.get(name, name), updates) for name, updates in layout.targets.items()]
    changes += [(m.model, list(u)) for g in touched for m, u in zip(g.members, g.updates, strict=True)]
    modules = dict(known.model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for name, updates in changes:
        head = name.rpartition(".")[0]
        if not isinstance(modules.get(head), Linear) or modules[head].bias is None:
            continue
        names = next((group for group in known.ties if f"{head}.bias" in group), (f"{head}.bias",))
        stored = [on_disk[n][0].name for n in names if n in on_disk]
        saved_tied = any(u.tied and u.kind == "modules_to_save" for u in updates)
        if any(u.tokens for u in updates) or (saved_tied and not any(n in layout.targets for n in stored)):
            found |= dict.fromkeys(stored, head)
    return found


def _rows_of_tokens(known: Architecture | None, on_disk: Mapping[str, tuple[Piece, ...]]) -> frozenset[str]:
    """Names in the output of the weights that have a row for each token."""
    if known is None:
        return frozenset((*INPUT_EMBEDDINGS, *OUTPUT_HEADS))
    names = [n for n in known.shapes if n.rpartition(".")[0] in known.vocabulary]
    return frozenset(on_disk[n][0].name if n in on_disk else n for n in names)


def _resize(
    base: Checkpoint,
    weights: Mapping[str, BaseWeight],
    layout: Layout,
    adapters: Sequence[Adapter],
    of_tokens: frozenset[str],
    heads: Collection[str],
) -> None:
    for name, updates in layout.targets.items():
        stored = weights.get(layout.added.get(name, name))
        if stored is None or name not in of_tokens:
            continue
        shape = vocabulary.resized(name, stored.shape, updates, adapters)
        if shape != stored.shape:
            layout.shapes[name] = shape
    grown = next((s[0] for s in layout.shapes.values() if len(s) == 2), None)
    for name in heads if grown else ():
        layout.shapes[name] = (grown,)
    sizes = {n: (weights[layout.added.get(n, n)].shape[0], s[0]) for n, s in layout.shapes.items() if len(s) == 2}
    vocabulary.number_of_rows(sizes, base.folder)


@dataclass
class _Search:
    """The settings under which the output is a complete model."""

    base: Checkpoint
    weights: Mapping[str, BaseWeight]
    adapters: Sequence[Adapter]
    config: Mapping[str, Any]
    layout: Layout
    groups: Sequence[Shared]
    apart: Sequence[Shared]

    @property
    def _rows(self) -> tuple[int, int] | None:
        shapes = self.layout.shapes
        sizes = {n: (self.weights[self.layout.added.get(n, n)].shape[0], s[0]) for n, s in shapes.items()}
        return next((size for n, size in sizes.items() if len(shapes[n]) == 2), None) or next(
            iter(sizes.values()), None
        )

    def by_usual_keys(self) -> None:
        """Without an architecture to ask: the keys that nearly all have, and the same number of rows everywhere."""
        rows = self._rows
        if self.apart:
            self.layout.config[TIE] = False
        if rows:
            self.layout.config["vocab_size"] = rows[1]
            for name in (*INPUT_EMBEDDINGS, *OUTPUT_HEADS):
                if name in self.weights and self.layout.shapes.get(name, self.weights[name].shape)[0] != rows[1]:
                    raise vocabulary.rows_missing(name, self.weights[name].shape[0], rows[1], self.adapters)
        self.layout.warnings.append(
            "transformers cannot build this model, so ties and vocabulary were changed by the usual names alone"
        )

    def by_architecture(self, known: Architecture, on_disk: Mapping[str, tuple[Piece, ...]]) -> None:
        first: AdapterError | None = None
        for config in self._configs(known):
            built = architecture_of(self.base, config)
            if built is None:
                continue
            proof = _Proof(self, known, on_disk, built)
            error = proof.error(both_stored=config.get(TIE) == self.config.get(TIE))
            if error is None:
                self._fill(proof)
                self._pad(proof)
                self.layout.config |= {k: v for k, v in config.items() if self.config.get(k) != v}
                if self.apart and proof.still_tied:
                    self.layout.warnings.append(
                        f"{type(known.model).__name__} ties {' and '.join(sorted(proof.still_tied))} whatever its "
                        "configuration says: both are stored, and transformers 5 leaves them apart, 4 does not"
                    )
                return
            first = first or error
        raise first or self._unbuildable()

    def _configs(self, known: Architecture) -> Iterator[dict[str, Any]]:
        """Each combination; last, with ties left in the configuration, where files that hold both names cut them."""
        rows = self._rows
        sized = [dict(self.config)]
        if rows:
            sized = list(resizings(self.config, known.text_settings, *rows))
        for config in sized:
            yield from untyings(config, known.text_settings) if self.apart else [config]
        if self.apart:
            yield from sized

    def _unbuildable(self) -> AdapterError:
        return AdapterError(
            "transformers cannot build this model with its ties cut or its vocabulary resized",
            where=self.base.folder / "config.json",
            expected="settings that it understands",
            next_step="serve it unmerged with PEFT",
        )

    def _fill(self, proof: "_Proof") -> None:
        """Names that were tied, and are not any more, get what the name that is stored gets."""
        targets, shapes = self.layout.targets, self.layout.shapes
        for name, source in proof.filled.items():
            self.layout.added[name] = source
            if source in targets:
                targets[name] = list(targets[source])
            if source in shapes:
                shapes[name] = shapes[source]

    def _pad(self, proof: "_Proof") -> None:
        for name, shape in proof.padded.items():
            self.layout.shapes[name] = shape
            self.layout.targets[name] = [vocabulary.kept(name, shape)]


class _Proof:
    """The output against the class, built with changed settings.

    filled: names that were tied and are not any more, which the output needs, too → the base's weight; padded:
    tensors that transformers fills with zeros; still_tied: names that have to differ and are one in the class.
    """

    def __init__(
        self,
        search: _Search,
        known: Architecture,
        on_disk: Mapping[str, tuple[Piece, ...]],
        built: Architecture,
    ) -> None:
        self.search, self.known, self.on_disk, self.built = search, known, on_disk, built
        self.filled: dict[str, str] = {}
        self.padded: dict[str, Shape] = {}
        self.still_tied = self._still_tied()
        layout = search.layout
        self.outputs = {n: layout.shapes.get(n, w.shape) for n, w in search.weights.items()}
        self.outputs |= {
            n: layout.shapes.get(n, search.weights[source].shape) for n, source in layout.added.items()
        }
        missing = built.unfilled(built.loaded(self.outputs))
        for group in search.groups:
            for member in group.members:
                if member.model in missing and member.name not in self.outputs:
                    self.filled[member.name] = group.source
        self.outputs |= {n: self._shape_like(source) for n, source in self.filled.items()}
        self.loaded = built.loaded(self.outputs)

    def _shape_like(self, source: str) -> Shape:
        return self.search.layout.shapes.get(source, self.search.weights[source].shape)

    def _still_tied(self) -> set[str]:
        found: set[str] = set()
        for group in self.search.apart:
            does = {m.model: _what(u) for m, u in zip(group.members, group.updates, strict=True)}
            for tie in self.built.ties:
                mine = [n for n in tie if n in does]
                if len({does[n] for n in mine}) > 1:
                    found |= set(mine)
        return found

    def error(self, both_stored: bool) -> AdapterError | None:
        """None if this is a complete model that computes what PEFT's does.

        both_stored: the configuration still ties, as transformers 5 does not with two names stored that differ.
        """
        if self.still_tied and not both_stored:
            return self._refused("the weight stays tied", min(self.still_tied))
        if not both_stored and self.known.scales_by_tie():
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
            if model.rpartition(".")[2] == _PADDED:
                self.padded[piece.name] = wanted
            elif len(found) == len(wanted) and found[1:] == wanted[1:]:
                return vocabulary.rows_missing(piece.name, found[0], wanted[0], self.search.adapters)
            else:
                return self._refused(f"the class has the shape {list(wanted)}, not {list(found)}", piece.name)
        return None

    def _misshapen_before(self, name: str, model: str) -> bool:
        stored = self.search.weights.get(name)
        same = self.outputs[name] == stored.shape if stored else False
        return same and stored is not None and self.known.shapes.get(model) != stored.shape

    def _refused(self, why: str, tensor: str | None) -> AdapterError:
        untied = " and ".join(sorted({m.name for g in self.search.apart for m in g.members}))
        what = f"the adapter changes {untied} in different ways, and the base has one weight for them"
        if not untied:
            what = "the vocabulary has another size"
        return AdapterError(
            f"{what}; with a configuration for that, {why}",
            where=self.search.base.folder,
            tensor=tensor,
            expected=f"a model of the class {type(self.known.model).__name__} that can hold the result",
            next_step="serve it unmerged with PEFT, or train with ensure_weight_tying=True",
        )


def _what(updates: Sequence[TargetUpdate]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    return tuple((u.owner, u.keys) for u in updates)
