"""Ways to write a config.json in which weights are no longer tied, or the vocabulary has another size.

Which of them an architecture takes, and what else it does there, is for the built model to tell.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Keys = tuple[str, ...]
TIE = "tie_word_embeddings"


def resizings(config: Mapping[str, Any], text: Keys, old: int, new: int) -> Iterator[dict[str, Any]]:
    """Configurations for a vocabulary of `new` instead of `old` rows. text: where the text model's settings lie."""
    sizes = _places(config, lambda k, v: k.endswith("vocab_size") and v == old)
    named = [keys for keys in sizes if keys[-1] == "vocab_size"]
    own = (*text, "vocab_size")
    yield _with(config, [*named, own], new)
    yield _with(config, [own], new)
    yield _with(config, named, new)
    yield _with(config, sizes, new)


def untyings(config: Mapping[str, Any], text: Keys) -> Iterator[dict[str, Any]]:
    """Configurations without ties, from that which says so wherever ties are spoken of."""
    flags = _places(config, lambda k, v: k == TIE and v is True)
    every = _places(config, lambda k, v: k.startswith("tie_") and v is True)
    yield _with(config, [*flags, (TIE,)], False)
    yield _with(config, [(TIE,)], False)
    yield _with(config, [*flags, (TIE,), (*text, TIE)], False)
    yield _with(config, [*every, (TIE,)], False)


def _places(config: Mapping[str, Any], wanted: Callable[[str, Any], bool], at: Keys = ()) -> list[Keys]:
    found = []
    for key, value in config.items():
        if wanted(key, value):
            found.append((*at, key))
        if isinstance(value, dict):
            found += _places(value, wanted, (*at, key))
    return found


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
