"""DoRA (arXiv:2402.09353, eq. 5) over any sum: V = W + Δ; W' = V·m/‖V‖, the norm of each output or of each input.

LyCORIS has both: `dora_scale` (out, 1, …) is for outputs (`wd_on_out`), (1, in, 1, …) for inputs, which was the
only way before its version 3.1.1. PEFT's magnitude (out,) is for outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_export.adapters.diffusion.kinds.module import Trained, Whole, blocks, check_covered, places_of
from lora_export.adapters.diffusion.pieces import Place, Shape
from lora_export.adapters.updates import terms_of
from lora_export.contracts import Update

if TYPE_CHECKING:
    import torch

SCALES = ("dora_scale", "magnitude")
NAME = "DoRA"


@dataclass(frozen=True)
class RowNormUpdate:
    """inner: W + Δ, row by row; magnitude: fp32 (rows,)."""

    inner: Update
    magnitude: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        changed = self.inner.apply(weight, rows)
        return changed.mul_(self._factor(changed, rows))

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """m/‖V‖ times the numbers that V is summed up from."""
        changed = self.inner.apply(weight.clone(), rows)
        return terms_of(self.inner, weight, terms.clone(), rows) * self._factor(changed, rows).abs()

    def _factor(self, changed: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        norms = torch.linalg.vector_norm(changed.flatten(1), dim=1, dtype=torch.float64)
        factor: torch.Tensor = (self.magnitude[rows].double() / norms).to(changed.dtype)
        return factor.reshape(-1, *(1 for _ in changed.shape[1:]))


@dataclass(frozen=True)
class ColumnNormUpdate:
    """inner: W + Δ; magnitude: fp32 (inputs,). norms: ‖V‖ of the trained weight, float64 (inputs,); None where all
    rows are given at once."""

    inner: Update
    magnitude: "torch.Tensor"
    norms: "torch.Tensor | None" = None

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        changed = self.inner.apply(weight, rows)
        return changed.mul_(self._factor(changed))

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """m/‖V‖ times the numbers that V is summed up from."""
        changed = self.inner.apply(weight.clone(), rows)
        return terms_of(self.inner, weight, terms.clone(), rows) * self._factor(changed).abs()

    def _factor(self, changed: "torch.Tensor") -> "torch.Tensor":
        norms = squares(changed).sqrt() if self.norms is None else self.norms
        factor = (self.magnitude.double() / norms).to(changed.dtype)
        return factor.reshape(1, -1, *(1 for _ in changed.shape[2:]))


def squares(rows: "torch.Tensor") -> "torch.Tensor":
    """The sum of squares for each input channel, float64."""
    import torch

    norms: torch.Tensor = torch.linalg.vector_norm(
        rows.reshape(*rows.shape[:2], -1), dim=(0, 2), dtype=torch.float64
    )
    return norms.square()


def dora(trained: Trained, inner: Whole) -> Whole:
    """inner: the sum that the norm is taken of."""
    part = next(scale for scale in SCALES if trained.has(scale))
    trained.file.refuse_weight(NAME, trained.module.keys[part])
    parts = (*inner.parts, part)
    stem = "dora" if inner.kind.startswith("lora") else f"{inner.kind}_dora"
    if not _over_inputs(trained, inner, part):

        def load(shape: Shape) -> RowNormUpdate:
            return RowNormUpdate(inner.load(shape), trained.read(part).reshape(-1))

        return replace(inner, kind=stem, parts=parts, load=load, adds=False, low_rank=False, copies=8)
    return _by_columns(trained, replace(inner, kind=f"{stem}_in", parts=parts), inner, part)


def _by_columns(trained: Trained, outer: Whole, inner: Whole, part: str) -> Whole:
    """A weight that is one tensor of the base is given whole, and may have been changed by other adapters. Where it
    lies in several, the norms are taken from the base as it is, block by block."""
    places = places_of(trained, inner.leaf, inner.outputs)
    together = len(places) == 1

    def load(shape: Shape) -> ColumnNormUpdate:
        update = inner.load(shape)
        norms = None if together else _norms(trained, update, places)
        return ColumnNormUpdate(update, trained.read(part).reshape(-1), norms)

    if not together:
        check_covered(trained, outer, places)
    return replace(
        outer, load=load, adds=False, low_rank=False, copies=8, row_wise=not together,
        beside=() if together else tuple(place.target for place in places),
    )  # fmt: skip


def _norms(trained: Trained, update: Update, places: list[Place]) -> "torch.Tensor":
    import torch

    total = sum(squares(block) for block in _changed(trained, update, places))
    assert isinstance(total, torch.Tensor)
    return total.sqrt()


def _changed(trained: Trained, update: Update, places: list[Place]) -> "Iterator[torch.Tensor]":
    for rows, block in blocks(trained, places):
        yield update.apply(block, rows)


def _over_inputs(trained: Trained, inner: Whole, part: str) -> bool:
    """Whether the norm is taken over everything but the inputs. AdapterError if the shape does not say it."""
    shape = trained.shape(part)
    # A weight of products is (out, rest) in the file; how many of the rest are channels the base knows.
    stored = trained.shapes.get(trained.target(trained.module.pieces[0], inner.leaf), ())
    if part == "magnitude":
        outputs, inputs = shape == (inner.outputs,), False
    else:
        ones = all(n == 1 for n in shape[2:])
        outputs = ones and shape[:2] == (inner.outputs, 1)
        inputs = ones and len(stored) > 1 and shape[:2] == (1, stored[1])
    if outputs == inputs:
        said = "may be for outputs as well as for inputs" if outputs else "is for neither outputs nor inputs"
        raise trained.file.refuse(
            f"{part} {list(shape)} {said} of a weight of {inner.outputs} outputs, which the base stores as "
            f"{list(stored)}",
            tensor=trained.module.keys[part],
            expected="(out, 1, …) or (1, in, 1, …)" if part == "dora_scale" else "one value for each output",
        )
    return inputs
