"""What the families share: a base known by its tensors, and spellings of its modules in a table."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_export.contracts import Piece

Pieces = tuple[Piece, ...]
Spelling = tuple[str, Pieces]


@dataclass(frozen=True)
class Swapped:
    """A module of the base whose upper and lower half the original repository stores the other way round."""

    module: str


# Where an original module lies in the base: a module, or several below each other.
Target = str | tuple[str, ...] | Swapped
QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class Base:
    """A component by its configuration and the shapes of its tensors, by name."""

    class_name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules that own a weight or a bias."""
        names = (n.rpartition(".") for n in self.shapes)
        return tuple(dict.fromkeys(module for module, _, leaf in names if leaf in ("weight", "bias") and module))

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The whole names of the others."""
        return tuple(n for n in self.shapes if n.rpartition(".")[2] not in ("weight", "bias"))

    @cached_property
    def _owned(self) -> frozenset[str]:
        return frozenset(self.modules)

    def has(self, module: str) -> bool:
        return module in self._owned

    def pieces(self, target: Target) -> Pieces | None:
        """Where an original module lies; None if the base has not all of it."""
        if isinstance(target, Swapped):
            return (Piece(target.module, swap=True),) if self.has(target.module) else None
        if isinstance(target, str):
            if target in self.shapes and not self.has(target):
                return (Piece(target, bare=True),)
            return (Piece(target),) if self.has(target) else None
        pieces, start = [], 0
        for module in target:
            shape = self.shapes.get(f"{module}.weight")
            if not shape:
                return None
            pieces.append(Piece(module, (start, start + shape[0])))
            start += shape[0]
        return tuple(pieces)

    def numbers(self, stem: str) -> list[str]:
        """The numbers of a list of blocks, in order: those that stand after `stem` in names."""
        cut = len(stem) + 1
        found = {n[cut:].partition(".")[0] for n in self.shapes if n.startswith(f"{stem}.")}
        return sorted((n for n in found if n.isdecimal()), key=int)

    def table(self, parts: Mapping[str, Target], theirs: str = "", ours: str = "") -> Iterator[Spelling]:
        """Original spellings below `theirs`, where the base has the modules below `ours`."""
        for spelling, target in parts.items():
            pieces = self.pieces(_below(target, ours))
            if pieces is not None:
                yield theirs + spelling, pieces

    def blocks(self, theirs: str, ours: str, parts: Mapping[str, Target]) -> Iterator[Spelling]:
        """The same for each block of a list."""
        for number in self.numbers(ours):
            yield from self.table(parts, f"{theirs}.{number}.", f"{ours}.{number}.")


def _below(target: Target, prefix: str) -> Target:
    if isinstance(target, Swapped):
        return Swapped(prefix + target.module)
    return prefix + target if isinstance(target, str) else tuple(prefix + t for t in target)


def under(stem: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{name}" for name in names)


def renamed(base: Base, rename: Callable[[str], str]) -> Iterator[Spelling]:
    """Spellings of a family where every module of the base has one other name."""
    for name in (*base.modules, *base.parameters):
        other = rename(name)
        if other != name and (pieces := base.pieces(name)):
            yield other, pieces


class Table:
    """Spellings of a component's modules, with dots and with the dots flattened to underscores.

    Several modules may share a spelling: all of them are kept, so that whoever looks it up can refuse.
    """

    def __init__(self, spellings: Iterable[Spelling], aliases: Iterable[Spelling] = ()) -> None:
        """aliases: with dots alone, and only where no other module is called so."""
        self._dotted: dict[str, list[Pieces]] = {}
        self._flat: dict[str, list[Pieces]] = {}
        for name, pieces in spellings:
            _add(self._dotted, name, pieces)
            _add(self._flat, name.replace(".", "_"), pieces)
        for name, pieces in [(n, p) for n, p in aliases if n not in self._dotted]:
            _add(self._dotted, name, pieces)

    def dotted(self, name: str) -> list[Pieces]:
        return self._dotted.get(name, [])

    def flat(self, name: str) -> list[Pieces]:
        return self._flat.get(name, [])

    def names(self, flat: bool) -> Iterable[str]:
        return self._flat if flat else self._dotted


def _add(table: dict[str, list[Pieces]], name: str, pieces: Pieces) -> None:
    known = table.setdefault(name, [])
    if pieces not in known:
        known.append(pieces)
