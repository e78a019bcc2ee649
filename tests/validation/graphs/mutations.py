"""Faults that an exporter, an optimization or a hand may put into a graph, each at a place drawn from a seed.

A kind lists the places of a graph where it could be; a place says in words what it changes and changes it. Whether
the result runs and answers otherwise is for the caller to see. The same place is found in every graph of the same
structure, whatever its weights, so that a fault can be put into the base's graph as well.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.validation.graphs import constants, structure
from tests.validation.graphs.graph import Graph

Change = Callable[[Graph], None]
# of a kind: (words, change) for each place, with figures drawn for each
Kind = Callable[[Graph, random.Random], list[tuple[str, Change]]]

KINDS: dict[str, Kind] = {
    "attention scale": constants.attention_scale,
    "epsilon": constants.epsilon,
    "softcap": constants.softcap,
    "scalar": constants.scalar,
    "rotary table": constants.rotary,
    "weight scale": constants.weight_scale,
    "quantized weight": constants.quantized,
    "beyond N tokens": constants.beyond,
    "axis": structure.axis,
    "mask": structure.mask,
    "padding alone": structure.padding,
    "causality": structure.causality,
    "type": structure.cast,
    "dropped residual": structure.residual,
    "dropped bias": constants.bias,
    "dropped norm": structure.norm,
    "dropped activation": structure.no_activation,
    "dropped attention": structure.attention,
    "other activation": structure.other_activation,
    "swapped inputs": structure.swapped,
    "positions": structure.positions,
    "second step": structure.cache,
}


@dataclass(frozen=True)
class Fault:
    kind: str
    graph: str  # file name
    words: str
    change: Change


def draw(kind: str, graph: Graph, rng: random.Random) -> Fault | None:
    """One of the places of this kind; None where the graph has none."""
    places = KINDS[kind](graph, rng)
    if not places:
        return None
    words, change = rng.choice(places)
    return Fault(kind, graph.path.name, words, change)
