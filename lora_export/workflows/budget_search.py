"""Which weights get more bits: the search alone, over exports that somebody makes and measures.

Groups of weights are raised in a given order, first to int8 and then to no quantization at all. What an export
keeps of the adapter grows with what is raised, but for noise, so that bisection finds the least that suffices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from lora_export.contracts import BudgetStep

Raised = Literal["int8", "unquantized"]
GALLOP = (1 / 8, 1 / 4, 1 / 2, 1)  # of the groups that are left, where those in int8 do not suffice
TRIES = 4  # at a size that was foretold too small
COARSE = 4  # steps to the largest size, for the frontier


class Sized(Protocol):
    """A group of weights: whether the adapter changes it, and its bytes as it is, in int8, and unquantized."""

    @property
    def touched(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def in_int8(self) -> int: ...
    @property
    def unquantized(self) -> int: ...


@dataclass(frozen=True)
class Rung:
    """group: its number; growth: bytes by which the export gets larger."""

    group: int
    to: Raised
    growth: int


Assignment = tuple[Rung, ...]


def ladder(groups: Sequence[Sized]) -> Assignment:
    """Every raise there is, in the order of the groups: all to int8, unless they are that, then all the way, but
    for the last: something has to be quantized."""
    first = [Rung(i, "int8", g.in_int8 - g.nbytes) for i, g in enumerate(groups) if g.in_int8 > g.nbytes]
    return (*first, *(Rung(i, "unquantized", g.unquantized - g.in_int8) for i, g in enumerate(groups[:-1])))


@dataclass
class Climb:
    """rungs: of `ladder`; touched: how many of the first ones the adapter changes; start: nothing raised, measured;
    measure: makes an export with these raises and measures it; most: bytes that it may have, None for any."""

    rungs: Assignment
    touched: int
    start: BudgetStep
    measure: Callable[[Assignment], BudgetStep]
    most: int | None = None
    measured: dict[Assignment, BudgetStep] = field(default_factory=dict)
    _beyond: int = 0  # bytes by which exports were larger than the sum of their weights

    def __post_init__(self) -> None:
        self.measured[()] = self.start

    def reach(self, least: float) -> Assignment:
        """The fewest raises, in their order, with which at least this share is kept. Where none reaches it, the
        best that was measured."""
        low, high = 0, None
        for mark in self._marks():
            count = min(mark, self._largest())
            if count <= low:
                break
            if self._keeps(self.rungs[:count], least):
                high = count
                break
            low = count
        if high is None:
            return self.best()
        while high - low > 1:
            middle = (low + high) // 2
            if self._keeps(self.rungs[:middle], least):
                high = middle
            else:
                low = middle
        found = self.rungs[:high]
        return found if self._fits(self.measured[found]) else self.best()

    def fill(self) -> Assignment:
        """The raises with which most of the adapter is kept within the size, of those that were measured: as many
        as fit, and some on the way there."""
        for _ in range(TRIES):
            chosen = self._fitting()
            if self._fits(self._measured(chosen)):
                break
        for part in range(1, COARSE):
            self._measured(chosen[: len(chosen) * part // COARSE])
        return self.best()

    def best(self) -> Assignment:
        """Of what was measured and fits, that which keeps most."""
        fitting = {raised: step for raised, step in self.measured.items() if self._fits(step)}
        return max(fitting, key=lambda raised: _order(fitting[raised]))

    def steps(self, chosen: Assignment) -> tuple[BudgetStep, ...]:
        """All that was measured, by size."""
        known = (replace(step, chosen=raised == chosen) for raised, step in self.measured.items())
        return tuple(sorted(known, key=lambda step: (step.nbytes, _order(step))))

    def _marks(self) -> list[int]:
        """Where to look first: at what the adapter changes in int8, then at everything in int8."""
        eight = sum(rung.to == "int8" for rung in self.rungs)
        left = len(self.rungs) - eight
        first = [self.touched, eight]
        return sorted({*first, *(eight + max(1, round(left * part)) for part in GALLOP if left)} - {0})

    def _largest(self) -> int:
        """How many raises fit in their order, as far as that can be foretold."""
        size = self.start.nbytes + self._beyond
        for count, rung in enumerate(self.rungs):
            size += rung.growth
            if self.most is not None and size > self.most:
                return count
        return len(self.rungs)

    def _fitting(self) -> Assignment:
        """Raises in their order, without those that do not fit any more, nor a second one without its first."""
        size, taken, reached = self.start.nbytes + self._beyond, [], {rung.group for rung in self.rungs}
        reached -= {rung.group for rung in self.rungs if rung.to == "int8"}
        for rung in self.rungs:
            ready = rung.to == "int8" or rung.group in reached
            if ready and (self.most is None or size + rung.growth <= self.most):
                size += rung.growth
                taken.append(rung)
                reached.add(rung.group)
        return tuple(taken)

    def _measured(self, raised: Assignment) -> BudgetStep:
        if raised not in self.measured:
            step = self.measured[raised] = self.measure(raised)
            foretold = self.start.nbytes + sum(rung.growth for rung in raised)
            self._beyond = max(self._beyond, step.nbytes - foretold)
        return self.measured[raised]

    def _keeps(self, raised: Assignment, least: float) -> bool:
        return self._measured(raised).keeps(least)

    def _fits(self, step: BudgetStep) -> bool:
        return self.most is None or step.nbytes <= self.most


def _order(step: BudgetStep) -> float:
    """By what is kept; what is no number keeps nothing."""
    return -math.inf if step.share is None or math.isnan(step.share) else step.share
