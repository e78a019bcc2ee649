"""Which branches a trace took because of sizes, and whether they are taken at other sizes too.

torch.export follows one path through a forward. Where the path depends on a dynamic size, it notes a condition,
which no graph checks: a graph of Swin's small window answers larger pictures without a word, and wrongly.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lora_export.onnx_export.engines.parts.graph_part import Axes, GraphPart

# Primes, which coincide with no other size; beyond a model's positions nobody asks.
_LENGTHS = (3, 37, 131, 509, 1021, 2039, 4093, 8191)
_ROWS = 5


@contextlib.contextmanager
def noted(asked: bool = True) -> Iterator[list[str]]:
    """Collects the conditions of all traces inside: torch.onnx.export makes checks in the program of them, which no
    graph has, and does not pass them on. Nothing is collected unless asked."""
    conditions: list[str] = []
    if not asked:
        yield conditions
        return
    export = torch.export.export

    def noting(*args: Any, **options: Any) -> Any:
        program = export(*args, **{**options, "prefer_deferred_runtime_asserts_over_guards": False})
        conditions.extend(getattr(program, "_guards_code", None) or ())
        return program

    torch.export.export = noting
    try:
        yield conditions
    finally:
        torch.export.export = export


def broken(codes: Sequence[str], part: GraphPart) -> str | None:
    """A size at which the path that was traced is not taken, in words; None where all are the same.

    codes: what `noted` collected. That a size is not one certain number does not count: such a path is the general
    one, and a shortcut that a model takes at that number comes to the same.
    """
    conditions = [compile(code, "<guard>", "eval") for code in codes if " != " not in code]
    for sizes in _sizes(part):
        inputs = [_Sized(shape, axes, sizes) for shape, _, axes in part.inputs.values()]
        if not all(_holds(condition, inputs) for condition in conditions):
            return ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    return None


def _sizes(part: GraphPart) -> Iterator[Mapping[str, int]]:
    """Sizes of the axes that a user may choose, as far as the model has positions for them."""
    axes = {name for _, _, named in part.inputs.values() for name in named.values()}
    if "height" in axes:
        for height, width in part.pictures:
            yield {"height": height, "width": width}
    elif axes & {"sequence_length"} and part.longest:
        yield from ({"sequence_length": n} for n in (*_LENGTHS, part.longest) if n <= part.longest)


class _Sized:
    """Stands for an input in a condition, which only asks for its sizes."""

    def __init__(self, shape: tuple[int, ...], axes: Axes, sizes: Mapping[str, int]) -> None:
        rows = {name: _ROWS for name in axes.values() if name.endswith("batch_size")}
        known = rows | dict(sizes)
        self._shape = tuple(known.get(axes.get(i, ""), size) for i, size in enumerate(shape))

    def size(self) -> tuple[int, ...]:
        return self._shape


def _holds(condition: Any, inputs: list[_Sized]) -> bool:
    """A condition on anything but sizes does not hold: it could not be checked."""
    try:
        return bool(eval(condition, {"math": math, "torch": torch, "L": {"values": inputs}}))
    except Exception:
        return False
