"""What updates make of tied weights and of the vocabulary, and the settings that the result needs.

What cannot be shown to be complete is refused.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.architecture import vocabulary
from lora_export.merging.architecture.layout import Change, Layout, Proof
from lora_export.merging.architecture.meta import Architecture, architecture_of
from lora_export.merging.architecture.settings import TIE, resizings, untyings
from lora_export.merging.planning.base import BaseWeight
from lora_export.merging.planning.loaded_names import Piece
from lora_export.merging.planning.names import INPUT_EMBEDDINGS, OUTPUT_HEADS
from lora_export.merging.planning.ties import Shared, changed, may_be_shared, shared_by_usual_names, shared_weights


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
    if grown is not None:
        layout.shapes |= dict.fromkeys(heads, (grown,))
    sizes = {n: (weights[layout.added.get(n, n)].shape[0], s[0]) for n, s in layout.shapes.items() if len(s) == 2}
    vocabulary.number_of_rows(sizes, base.folder)


def _refuse_other_tables(base: Checkpoint, known: Architecture, rows: tuple[int, int] | None) -> None:
    """Refuse a vocabulary that grows where a further table has a row for each token, as in Gemma 3n: training gave
    it new rows at random, and PEFT saves none of them."""
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
    """Without an architecture to ask: the keys that nearly all have, and the same number of rows everywhere."""
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
    """Look for the settings under which the output is a complete model. config: the base's, before that."""
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
                    f"{type(known.model).__name__} ties {' and '.join(sorted(proof.still_tied))} whatever its "
                    "configuration says: all are stored, and transformers 5 leaves them apart, 4 does not"
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
