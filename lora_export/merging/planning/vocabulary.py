"""A vocabulary of another size than the base's: the weights that change with it, and the config.json that says so.

PEFT saves the resized weights whole (`save_embedding_layers`, `modules_to_save`, `base_layer` beside LoRA), or the
trained rows alone (`trainable_token_indices`). A row that was neither trained nor saved is refused. There are
several ways to write a config.json in which the vocabulary has another size or weights are no longer tied: which of
them an architecture takes, and what else they change, only the built model can tell.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.adapters.config import PEFT_EMBEDDINGS
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.architecture.model import Keys
from lora_export.merging.architecture.pieces import Shape

if TYPE_CHECKING:
    import torch

TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Kept:
    """The old numbers, cut to the size of the resized weight, or with zeros behind them."""

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return weight


@dataclass(frozen=True)
class Zeros:
    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return weight.new_zeros(weight.shape)


def no_bias(name: str) -> TargetUpdate:
    """The bias of a head that PEFT computes without it."""
    return TargetUpdate(name, "head without bias", (), ((None,),), lambda _: Zeros(), replaces=True)


def kept(name: str, shape: Shape) -> TargetUpdate:
    """A tensor as transformers cuts or pads it with the vocabulary, such as BART's final_logits_bias."""
    return TargetUpdate(name, "vocabulary", (), (shape,), lambda _: Kept())


def resized(name: str, old: Shape, updates: Sequence[TargetUpdate], adapters: Sequence[Adapter]) -> Shape:
    """The shape that updates give a weight with a row for each token; `old` where none changes it.

    AdapterError where rows are needed that the adapter does not hold.
    """
    shape = old
    for update in updates:
        known = update.shapes[0]
        if update.replaces and known[0] and len(known) == len(shape) and known[1:] == shape[1:]:
            shape = tuple(n or 0 for n in known)
        elif update.tokens and max(update.tokens) >= shape[0]:
            shape = _with_tokens(name, shape, update, adapters[update.owner])
        elif not update.fits(shape):
            rows = _rows_meant(update, shape)
            if rows and rows > shape[0]:
                raise rows_missing(name, shape[0], rows, adapters)
            shape = (rows or shape[0], *shape[1:])
    return shape


def _with_tokens(name: str, shape: Shape, update: TargetUpdate, adapter: Adapter) -> Shape:
    """The weight with the trained rows behind its own: every row in between must be trained, too."""
    count = max(update.tokens) + 1
    unknown = sorted(set(range(shape[0], count)) - set(update.tokens))
    if unknown:
        raise AdapterError(
            f"the token {max(update.tokens)} is trained, the base has {shape[0]} rows, and the adapter does not "
            f"hold the row {unknown[0]}",
            where=adapter.folder,
            tensor=name,
            expected=f"every row from {shape[0]} on, or the base with the vocabulary that training had",
            next_step="save the adapter again with save_embedding_layers=True, or give the resized base as -b",
        )
    return (count, *shape[1:])


def _rows_meant(update: TargetUpdate, shape: Shape) -> int | None:
    """The rows that an update is for, where all but their number fits."""
    return next((s[0] for s in update.shapes if len(s) == len(shape) and s[1:] == shape[1:] and s[0]), None)


def rows_missing(name: str, stored: int, rows: int, adapters: Sequence[Adapter]) -> AdapterError:
    """The error for a weight that was resized in training, and whose rows are in no file."""
    return AdapterError(
        f"the vocabulary was resized to {rows}, but this tensor still has {stored} rows, and the adapter does not "
        "hold the others",
        where=adapters[0].folder if adapters else Path(),
        tensor=name,
        expected=f"{rows} rows in the adapter, or in the base",
        next_step=_how_to_save(adapters),
    )


def _how_to_save(adapters: Sequence[Adapter]) -> str:
    """Where embed_tokens or lm_head is adapted, PEFT does not save the other, even with save_embedding_layers."""
    targets = next((a.config.get("target_modules") for a in adapters), None)
    names = [targets] if isinstance(targets, str) else list(targets or ())
    if any(str(n).rpartition(".")[2] in PEFT_EMBEDDINGS for n in names):
        return (
            "give as -b the base that training resized (save_pretrained before training), or train with this "
            "module in modules_to_save"
        )
    return (
        "save the adapter again: model.save_pretrained(DIR, save_embedding_layers=True), or give the resized base "
        "as -b"
    )


def check_one_size(sizes: Mapping[str, tuple[int, int]], where: Path) -> None:
    """sizes: name → (old, new) rows of each embedding and head that is resized."""
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"{old} to {new}" for old, new in sorted(set(sizes.values())))
        raise AdapterError(
            f"embedding and output head were resized from or to different sizes: {each}",
            where=where,
            tensor=min(sizes),
            expected="one size of the vocabulary",
        )


def resizings(config: Mapping[str, Any], text: Keys, old: int, new: int) -> Iterator[dict[str, Any]]:
    """Configurations for a vocabulary of `new` instead of `old` rows. text: where the text model's settings lie."""
    sizes = _places(config, lambda k, v: k.endswith("vocab_size") and v == old)
    plain = [keys for keys in sizes if keys[-1] == "vocab_size"]
    own = (*text, "vocab_size")
    yield _with(config, [*plain, own], new)
    yield _with(config, [own], new)
    yield _with(config, plain, new)
    yield _with(config, sizes, new)


def untyings(config: Mapping[str, Any], text: Keys) -> Iterator[dict[str, Any]]:
    """Configurations without ties; the first says so at every place where ties are mentioned."""
    flags = _places(config, lambda k, v: k == TIE and v is True)
    every = _places(config, lambda k, v: k.startswith("tie_") and v is True)
    yield _with(config, [*flags, (TIE,)], False)
    yield _with(config, [(TIE,)], False)
    yield _with(config, [*flags, (TIE,), (*text, TIE)], False)
    yield _with(config, [*every, (TIE,)], False)


def _places(config: Mapping[str, Any], wanted: Callable[[str, Any], bool], at: Keys = ()) -> list[Keys]:
    places = []
    for key, value in config.items():
        if wanted(key, value):
            places.append((*at, key))
        if isinstance(value, dict):
            places += _places(value, wanted, (*at, key))
    return places


def _with(config: Mapping[str, Any], places: list[Keys], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    for *path, key in places:
        part = changed
        for step in path:
            if not isinstance(part.get(step), dict):
                part[step] = {}
            part = part[step]
        part[key] = value
    return changed


def side_effects(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two configurations, as transformers understood them, differ in more than ties and vocabularies."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return any(old.get(k) != new.get(k) for k in old.keys() | new.keys() if not _expected(k))


def _expected(keys: Keys) -> bool:
    key = keys[-1]
    return key.startswith("tie_") or key.endswith("vocab_size") or key in ("_name_or_path", "transformers_version")


def _leaves(config: Mapping[str, Any], at: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key), value
