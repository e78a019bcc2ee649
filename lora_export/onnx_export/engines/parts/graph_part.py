"""A part of a model that becomes one graph file, and what all kinds of parts share."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.choices import ModelKind

Axes = dict[int, str]
Input = tuple[tuple[int, ...], torch.dtype, Axes]
BATCH, LENGTH = 2, 16  # sizes to trace with; 1 would be taken for a constant
PAST, ENCODED = 5, 11


class NotTraceable(Exception):
    """What of a model cannot be in a graph, in words for a person."""


@dataclass(frozen=True)
class GraphPart:
    """run: takes the inputs and returns the outputs, in order; caches: whether it has a cache as input or output.

    inputs: by name, the shape and type to trace with, and dynamic axes; outputs: their dynamic axes.
    pictures, longest: sizes at which forward has to take the path that was traced: of pictures, and of texts up to
    `longest` tokens; fallback: what is traced instead where it does not.
    """

    file: str
    data: str
    run: Callable[..., tuple[torch.Tensor, ...]]
    inputs: Mapping[str, Input]
    outputs: Mapping[str, Axes]
    caches: bool = False
    pictures: tuple[tuple[int, int], ...] = ()
    longest: int = 0
    fallback: "GraphPart | None" = None


@dataclass(frozen=True)
class Traced:
    kind: ModelKind
    task: str
    parts: tuple[GraphPart, ...] = field(default=())


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has an input of this name."""
    return name in inspect.signature(model.forward).parameters
