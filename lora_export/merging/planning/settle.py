"""The output where weights are tied or the vocabulary changes: what updates make of it, and the settings it needs.

The class that will load the output is built with the changed settings, without weights: the output must fill every
name of it, in its shape, and what has to differ must not be one weight there. What cannot be shown to be complete
is refused.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.architecture.model import Architecture, architecture_of
from lora_export.merging.architecture.pieces import Shape, StoredPiece
from lora_export.merging.planning import vocabulary
from lora_export.merging.planning.base import BaseWeight
from lora_export.merging.planning.names import INPUT_EMBEDDINGS, OUTPUT_HEADS
from lora_export.merging.planning.ties import Shared, changed, may_be_shared, shared_by_usual_names, shared_weights
from lora_export.merging.planning.vocabulary import TIE, resizings, side_effects, untyings

_UNTIED = frozenset({"CLIPTextModel", "CLIPTextModelWithProjection"})
_PADDED = "final_logits_bias"  # of BART and its kin: transformers fills it with zeros


@dataclass
class Layout:
    """targets: name in the output → updates; added: name that the base lacks → the weight that it starts from;
    shapes: of what is resized; config: keys of config.json to set."""

    targets: dict[str, list[TargetUpdate]]
    added: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """What changes. known, on_disk: the base's architecture, and name in it → the tensors that make it;
    groups: all weights that several names share; apart: those whose names must differ from now on."""

    base: Checkpoint
    weights: Mapping[str, BaseWeight]
    adapters: Sequence[Adapter]
    layout: Layout
    groups: Sequence[Shared]
    apart: Sequence[Shared]
    known: Architecture
    on_disk: Mapping[str, tuple[StoredPiece, ...]]


class Proof:
    """The output against the class, built with changed settings.

    filled: names that are no longer tied, which the output needs, too → the base's weight; kept:
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
        missing = set(built.unfilled(built.loaded(self.outputs)))
        for group in change.groups:
            for member in group.members:
                if member.model in missing and member.name not in self.outputs:
                    self.filled[member.name] = group.source
        self.outputs |= {n: self._shape_like(source) for n, source in self.filled.items()}
        self.loaded = built.loaded(self.outputs)

    def complete(self) -> None:
        """Give names that are no longer tied what the stored name gets; cut and pad tensors."""
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
        names: set[str] = set()
        for group in self.change.apart:
            does = {m.model: _what(u) for m, u in zip(group.members, group.updates, strict=True)}
            for tie in self.built.ties:
                mine = [n for n in tie if n in does]
                if len({does[n] for n in mine}) > 1:
                    names |= set(mine)
        return names

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
        missing = set(self.built.unfilled(self.loaded)) - set(self.known.unfilled(self.on_disk))
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
            shape = self.outputs[piece.name]
            if shape == wanted or self._misshapen_before(piece.name, model):
                continue
            fewer = len(shape) == len(wanted) and all(w <= n for n, w in zip(shape, wanted, strict=True))
            if fewer or model.rpartition(".")[2] == _PADDED:
                self.kept[piece.name] = wanted
            elif len(shape) == len(wanted) and shape[1:] == wanted[1:]:
                return vocabulary.rows_missing(piece.name, shape[0], wanted[0], self.change.adapters)
            else:
                return self._refused(f"the class has the shape {list(wanted)}, not {list(shape)}", piece.name)
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
            expected=f"a model of the class {self.known.name} that can hold the result",
            next_step="serve it unmerged with PEFT, or train with ensure_weight_tying=True",
        )


def _what(updates: Sequence[TargetUpdate]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    return tuple((u.owner, u.keys) for u in updates)


def settle(
    base: Checkpoint,
    weights: Mapping[str, BaseWeight],
    targets: Mapping[str, list[TargetUpdate]],
    adapters: Sequence[Adapter],
    changes: Mapping[str, Any],
) -> Layout:
    """What the updates of `targets` make of ties and vocabulary. AdapterError where the model would be incomplete.

    changes: of the configuration, for other reasons.
    """
    layout = Layout(dict(targets))
    grows = any(u.tokens for updates in targets.values() for u in updates)
    if (_shares_nothing(base.config) and not grows) or not may_be_shared(targets, weights):
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
    if known:
        _refuse_other_tables(base, known, _rows(weights, layout))
    apart = [g for g in touched if not g.alike]
    if apart or layout.shapes:
        if known:
            change = Change(base, weights, adapters, layout, groups, apart, known, on_disk)
            _by_architecture(change, dict(base.config) | dict(changes))
        else:
            _by_usual_keys(base, weights, adapters, layout, bool(apart))
    return layout


def _shares_nothing(config: Mapping[str, Any]) -> bool:
    """Whether no weights of such a model are shared: models of diffusers, and CLIP's text encoders."""
    return "_class_name" in config or (config.get("architectures") or [""])[0] in _UNTIED


def _spread(group: Shared, layout: Layout) -> None:
    """The updates of a shared weight under each of its names; of one that stays shared, under the stored ones."""
    for member, updates in zip(group.members, group.updates, strict=True):
        layout.targets.pop(member.name, None)
        if member.stored or not group.alike:
            if not member.stored:
                layout.added[member.name] = group.source
            if updates:
                layout.targets[member.name] = list(updates)


def _heads_without_bias(
    known: Architecture, on_disk: Mapping[str, tuple[StoredPiece, ...]], touched: Sequence[Shared], layout: Layout
) -> dict[str, str]:
    """Stored bias → its head. TrainableTokensLayer calls F.linear without a bias; ensure_weight_tying saves a head
    as a new Linear without one (peft/tuners/trainable_tokens/layer.py, peft/utils/other.py)."""
    from torch.nn import Linear

    model_names = {pieces[0].name: name for name, pieces in on_disk.items()}
    changes = [(model_names.get(name, name), updates) for name, updates in layout.targets.items()]
    changes += [(m.model, list(u)) for g in touched for m, u in zip(g.members, g.updates, strict=True)]
    modules = dict(known.model.named_modules(remove_duplicate=False))
    heads: dict[str, str] = {}
    for name, updates in changes:
        head = name.rpartition(".")[0]
        if not isinstance(modules.get(head), Linear) or modules[head].bias is None:
            continue
        names = next((group for group in known.ties if f"{head}.bias" in group), (f"{head}.bias",))
        stored = [on_disk[n][0].name for n in names if n in on_disk]
        saved_tied = any(u.tied and u.kind == "modules_to_save" for u in updates)
        if any(u.tokens for u in updates) or (saved_tied and not any(n in layout.targets for n in stored)):
            heads |= dict.fromkeys(stored, head)
    return heads


def _rows_of_tokens(known: Architecture | None, on_disk: Mapping[str, tuple[StoredPiece, ...]]) -> frozenset[str]:
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
    if grown is not None:
        layout.shapes |= dict.fromkeys(heads, (grown,))
    sizes = {n: (weights[layout.added.get(n, n)].shape[0], s[0]) for n, s in layout.shapes.items() if len(s) == 2}
    vocabulary.check_one_size(sizes, base.folder)


def _refuse_other_tables(base: Checkpoint, known: Architecture, rows: tuple[int, int] | None) -> None:
    """Refuse a vocabulary that grows where a further table has a row for each token, as in Gemma 3n: training gave
    it random new rows, and PEFT saves none of them."""
    from torch.nn import Embedding

    old, new = rows or (0, 0)
    for name, module in known.model.named_modules():
        if isinstance(module, Embedding) and module.num_embeddings == old < new and name not in known.vocabulary:
            raise AdapterError(
                f"the vocabulary was resized to {new}, but this table still has {old} rows, and no adapter holds "
                "the others",
                where=base.folder,
                tensor=f"{name}.weight",
                expected=f"{new} rows in the base",
                next_step="give as -b the base that training resized (save_pretrained before training)",
            )


def _by_usual_keys(
    base: Checkpoint, weights: Mapping[str, BaseWeight], adapters: Sequence[Adapter], layout: Layout, apart: bool
) -> None:
    """Without a known architecture: the keys that nearly all have, and the same number of rows everywhere."""
    rows = _rows(weights, layout)
    if apart:
        layout.config[TIE] = False
    if rows:
        layout.config["vocab_size"] = rows[1]
        for name in (*INPUT_EMBEDDINGS, *OUTPUT_HEADS):
            if name in weights and layout.shapes.get(name, weights[name].shape)[0] != rows[1]:
                raise vocabulary.rows_missing(name, weights[name].shape[0], rows[1], adapters)
    layout.warnings.append(
        "transformers cannot build this model, so ties and vocabulary were changed by the usual names alone"
    )


def _rows(weights: Mapping[str, BaseWeight], layout: Layout) -> tuple[int, int] | None:
    """(old, new) rows of the vocabulary, None if it keeps its size."""
    matrices_first = sorted(layout.shapes, key=lambda n: -len(layout.shapes[n]))
    sizes = ((weights[layout.added.get(n, n)].shape[0], layout.shapes[n][0]) for n in matrices_first)
    return next(sizes, None)


def _by_architecture(change: Change, config: Mapping[str, Any]) -> None:
    """Find settings under which the output is a complete model. config: the base's, before that."""
    layout, known = change.layout, change.known
    first: AdapterError | None = None
    for wanted, by_files in _configs(config, known, _rows(change.weights, layout), bool(change.apart)):
        built = architecture_of(change.base, wanted)
        if built is None:
            continue
        proof = Proof(change, built)
        error = proof.error(by_files)
        if error is None:
            proof.complete()
            layout.config |= {k: v for k, v in wanted.items() if config.get(k) != v}
            if by_files:
                layout.warnings.append(
                    f"{known.name} ties {' and '.join(sorted(proof.still_tied))} whatever its "
                    "configuration says: all are stored, and transformers 5 does not tie them, 4 does"
                )
            return
        first = first or error
    raise first or AdapterError(
        "transformers cannot build this model with its ties cut or its vocabulary resized",
        where=change.base.folder / "config.json",
        expected="settings that it understands",
        next_step="serve it unmerged with PEFT",
    )


def _configs(
    config: Mapping[str, Any], known: Architecture, rows: tuple[int, int] | None, apart: bool
) -> Iterator[tuple[dict[str, Any], bool]]:
    """(settings, whether the ties are left in them, to be cut by files that hold every name)."""
    text = known.text_settings
    sized = list(resizings(config, text, *rows)) if rows else [dict(config)]
    for one in sized:
        for wanted in untyings(one, text) if apart else [one]:
            yield wanted, False
    for one in sized if apart else ():
        yield one, True
