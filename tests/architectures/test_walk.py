"""A walk over the architectures of transformers: adapters of several sorts on each, merged right or refused.

outcomes.txt holds what is not merged: refusals with their words, and what transformers or PEFT cannot do, so that
there is nothing to compare with. `python -m tests.architectures.test_walk` writes it again (a quarter of an hour):
read the difference.
"""

import gc
import tempfile
from pathlib import Path

import pytest

from tests.architectures.cells import Cell, Result, cells, run
from tests.daily import daily

OUTCOMES = Path(__file__).with_name("outcomes.txt")
HEADING = "# cell | outcome | words"


def listed() -> dict[str, Result]:
    lines = OUTCOMES.read_text().splitlines() if OUTCOMES.is_file() else []
    rows = [line.split(" | ", 2) for line in lines if not line.startswith("#")]
    return {cell: Result(outcome, words) for cell, outcome, words in rows}  # type: ignore[arg-type]


LISTED = listed()
TRIED = [c for c in cells() if LISTED.get(str(c), Result("right")).outcome != "not to be had"]
REFUSED = [c for c in TRIED if str(c) in LISTED]
# Every sort of adapter on models of every task, spread over the alphabet.
SORTS = sorted({(c.architecture.task, c.kind) for c in TRIED})
DAILY = [
    c
    for i, sort in enumerate(SORTS)
    for same in [[c for c in TRIED if (c.architecture.task, c.kind) == sort]]
    for c in {same[(7 * i) % len(same)]: None, same[(7 * i + len(same) // 2) % len(same)]: None}
][:40]


@pytest.mark.parametrize("cell", daily(TRIED, DAILY), ids=map(str, TRIED))
def test_architecture_merged_equals_unmerged(cell: Cell, tmp_path: Path) -> None:
    assert run(cell, tmp_path) == LISTED.get(str(cell), Result("right"))


def test_walk_outcomes_are_mostly_right() -> None:
    assert len(TRIED) >= 350 and len(DAILY) == 40
    assert len(REFUSED) <= 0.02 * len(TRIED)
    assert {r.outcome for r in LISTED.values()} <= {"refused", "not to be had"}
    assert LISTED.keys() <= {str(c) for c in cells()}


@pytest.mark.slow
def test_walk_incomparable_cells_are_listed(tmp_path: Path) -> None:
    """If transformers or PEFT learn one of these, it belongs among those that are tried."""
    others = [c for c in cells() if LISTED.get(str(c), Result("right")).outcome == "not to be had"]
    found = {str(c): run(c, tmp_path / str(i)).outcome for i, c in enumerate(others)}
    assert found == dict.fromkeys(found, "not to be had")


def write() -> None:
    """The outcomes of all cells that are not right."""
    lines = [HEADING]
    for cell in cells():
        with tempfile.TemporaryDirectory() as folder:
            result = run(cell, Path(folder))
        if result.outcome != "right":
            lines.append(f"{cell} | {result.outcome} | {' '.join(result.words.split())}")
        gc.collect()
    OUTCOMES.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
