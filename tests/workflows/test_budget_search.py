"""The search for the bits of each weight, over exports that a function makes up."""

import itertools
from dataclasses import dataclass, field

import pytest

from lora_export.contracts import BudgetStep
from lora_export.workflows.budget_search import Assignment, Climb, Rung, ladder

START, ALIGNMENT = 1000, 7


@dataclass(frozen=True)
class Weights:
    touched: bool
    nbytes: int = 10
    in_int8: int = 20
    unquantized: int = 80


GROUPS = [Weights(i < 5) for i in range(16)]


@dataclass
class Exports:
    """What an export keeps grows with each raise; gain: by how much."""

    gain: float = 0.005
    first: float = 0.8
    asked: list[Assignment] = field(default_factory=list)

    def measure(self, raised: Assignment) -> BudgetStep:
        self.asked.append(raised)
        return step(START + ALIGNMENT * bool(raised) + sum(r.growth for r in raised), self.share(len(raised)))

    def share(self, raised: int) -> float:
        return self.first + self.gain * raised

    def climb(self, most: int | None = None) -> Climb:
        return Climb(ladder(GROUPS), 5, step(START, self.share(0)), self.measure, most)


def step(nbytes: int, share: float) -> BudgetStep:
    return BudgetStep(nbytes, 0, 0, share, 0.01)


def test_ladder_int4_raises_to_int8_first_and_leaves_one_quantized() -> None:
    rungs = ladder(GROUPS[:2])
    assert rungs == (Rung(0, "int8", 10), Rung(1, "int8", 10), Rung(0, "unquantized", 60))


def test_ladder_int8_is_only_left_unquantized() -> None:
    assert [r.to for r in ladder([Weights(True, 20, 20)] * 3)] == ["unquantized"] * 2


@pytest.mark.parametrize("needed", [1, 4, 5, 6, 11, 16, 17, 18, 25, 31])
def test_reach_any_threshold_finds_fewest_raises(needed: int) -> None:
    exports = Exports()
    climb = exports.climb()
    chosen = climb.reach(exports.share(needed) - 1e-9)
    assert len(chosen) == needed
    assert len(exports.asked) == len(set(exports.asked)) <= 9
    (taken,) = (s for s in climb.steps(chosen) if s.chosen)
    assert taken.nbytes == climb.measured[chosen].nbytes


def test_reach_beyond_everything_gives_what_keeps_most() -> None:
    assert len(Exports().climb().reach(0.99)) == 31


def test_reach_noise_takes_only_what_was_measured_to_suffice() -> None:
    """The share falls back at 3 of 5: a bisection may find another place, but one that keeps enough."""
    exports = Exports()
    exports.share = lambda n: 0.9 if n in (2, 4) or n > 4 else 0.8  # type: ignore[method-assign]
    chosen = exports.climb().reach(0.9)
    assert exports.share(len(chosen)) >= 0.9 and len(chosen) in (2, 4)


def test_reach_with_size_stops_at_what_fits() -> None:
    exports = Exports()
    climb = exports.climb(most=START + 65)
    chosen = climb.reach(0.95)
    assert climb.measured[chosen].nbytes <= START + 65
    assert len(chosen) == 5, "six would fit without the alignment, which no sum of weights tells"


def test_fill_size_takes_as_much_as_fits() -> None:
    exports = Exports()
    climb = exports.climb(most=START + 75)
    chosen = climb.fill()
    assert len(chosen) == 6 and climb.measured[chosen].nbytes == START + 67
    sizes = [s.nbytes for s in climb.steps(chosen)]
    assert sizes == sorted(sizes) and len(sizes) >= 4


def test_fill_everything_in_int8_goes_on_unquantized() -> None:
    climb = Exports().climb(most=START + 160 + 60 + ALIGNMENT)
    assert [r.to for r in climb.fill()].count("unquantized") == 1


def test_fill_takes_the_best_that_was_measured() -> None:
    exports = Exports()
    exports.share = lambda n: 0.9 - 0.01 * n  # type: ignore[method-assign]
    assert exports.climb(most=START + 75).fill() == ()


def test_fitting_skips_what_is_too_large() -> None:
    groups = [Weights(True), Weights(True, in_int8=500), Weights(True)]
    exports = Exports()
    climb = Climb(ladder(groups), 3, step(START, 0.8), exports.measure, START + 30)
    assert [r.group for r in climb.fill()] == [0, 2]
    assert all(a.to == "int8" for a in itertools.chain(*exports.asked))
