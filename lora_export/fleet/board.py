"""How far a fleet is: rows by base and state, rates, time left; a live table, or a line now and then."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lora_export.contracts.fleet import STATES, PlannedRow, RowOutcome, State
from lora_export.contracts.progress import Progress
from lora_export.progress import Console

if TYPE_CHECKING:
    from rich.table import Table

EVERY = 30.0  # seconds between two lines where there is no terminal
MOST_TOLD = 20  # rows that went wrong that get a line of their own
_SHOWN: tuple[State, ...] = ("gate", "refused", "died", "timeout")


@dataclass
class _Base:
    """Rows of one base: how many there are, what is running, what became of the others, and for how long workers
    were at those that are done."""

    rows: int = 0
    running: int = 0
    states: Counter[State] = field(default_factory=Counter)
    seconds: float = 0.0
    worked: int = 0
    preparing: int = 0
    elsewhere: bool = False

    @property
    def left(self) -> int:
        return self.rows - self.states.total()


class Board:
    """Told by the driver what happens, tells a person. slots: tasks that run at once."""

    def __init__(self, planned: Sequence[PlannedRow], progress: Progress, slots: int = 1) -> None:
        self._progress, self.slots = progress, slots
        self._begun = self._told = time.monotonic()
        self._bases: dict[str, _Base] = {}
        self._changed, self._wrong = False, 0
        self._warnings: set[str] = set()
        for row in planned:
            base = self._bases.setdefault(row.row.base, _Base())
            base.rows += 1
            if row.state is not None:
                base.states[row.state] += 1
        self._before = sum(b.states.total() for b in self._bases.values())
        self._names: dict[str, list[str]] = {}
        for row in planned:
            names = self._names.setdefault(row.base_key, [])
            if row.row.base not in names:
                names.append(row.row.base)

    # --- what the driver tells -------------------------------------------------------------------------------

    def started(self, planned: PlannedRow, kind: Literal["base", "row"]) -> None:
        base = self._bases[planned.row.base]
        base.elsewhere = False
        if kind == "base":
            base.preparing += 1
            self._progress.detail(f"preparing {planned.row.base}, measured with {planned.row.name}")
        else:
            base.running += 1
        self._changed = True

    def ended(self, planned: PlannedRow, kind: Literal["base", "row"]) -> None:
        base = self._bases[planned.row.base]
        if kind == "base":
            base.preparing -= 1
        else:
            base.running -= 1
        self._changed = True

    def finished(self, planned: PlannedRow, outcome: RowOutcome) -> None:
        base = self._bases[planned.row.base]
        base.states[outcome.state] += 1
        if outcome.state == "done":
            base.seconds += outcome.seconds
            base.worked += 1
        self._changed = True
        self._warned(outcome.name, outcome)
        words = f"{outcome.name}: {outcome.state}"
        if outcome.state in _SHOWN:
            self._wrong += 1
            found = str((outcome.error or {}).get("found") or "")
            if self._wrong <= MOST_TOLD:
                self._progress.warn(f"{words}: {found}" if found else words)
            elif self._wrong == MOST_TOLD + 1:
                self._progress.warn("more rows went wrong; fleet.md names them all")
        else:
            self._progress.detail(f"{words} in {outcome.seconds:.1f} s")

    def _warned(self, name: str, outcome: RowOutcome) -> None:
        """What the worker was warned of, each text once: all rows of a base may share one."""
        for text in outcome.warnings:
            if text not in self._warnings:
                self._warnings.add(text)
                self._progress.warn(f"{name}: {text}")

    def again(self, planned: PlannedRow, outcome: RowOutcome) -> None:
        found = str((outcome.error or {}).get("found") or "")
        self._progress.detail(f"{planned.row.name} is tried again: {found}")

    def waiting(self, base_key: str) -> None:
        """For a base that another driver prepares."""
        for name in self._names.get(base_key, ()):
            self._bases[name].elsewhere = True

    def prepared(self, base_key: str, outcome: RowOutcome) -> None:
        names = ", ".join(self._names.get(base_key, ()))
        self._warned(names, outcome)
        if outcome.state in ("done", "skipped"):
            self._progress.detail(f"{names} is prepared ({outcome.seconds:.1f} s)")
        else:
            found = str((outcome.error or {}).get("found") or outcome.state)
            self._progress.warn(f"{names} could not be prepared once for all its rows: {found}")

    def tick(self) -> None:
        """A line, if there is something to say and the last one is old enough."""
        now = time.monotonic()
        if self._changed and now - self._told >= EVERY:
            self._told, self._changed = now, False
            self._progress.stage(self.line())

    # --- what a person reads -----------------------------------------------------------------------------------

    def line(self) -> str:
        """Everything in one line."""
        all_ = self._bases.values()
        counts = sum((b.states for b in all_), Counter[State]())
        told = ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
        running = sum(b.running + b.preparing for b in all_)
        text = f"{counts.total()} of {sum(b.rows for b in all_)} rows" + (f" ({told})" if told else "")
        return f"{text}, {running} running, {self._speed()}"

    def _speed(self) -> str:
        elapsed = time.monotonic() - self._begun
        done = sum(b.states.total() for b in self._bases.values()) - self._before
        rate = f"{60 * done / elapsed:.1f} rows a minute" if done and elapsed > 1 else "no row done yet"
        left = self.seconds_left()
        return rate if left is None else f"{rate}, about {duration(left)} left"

    def seconds_left(self) -> float | None:
        """By what a row of each base took, or of all bases where none of it is done; None before the first row."""
        worked = sum(b.worked for b in self._bases.values())
        if not worked:
            return None
        mean = sum(b.seconds for b in self._bases.values()) / worked
        work = sum(b.left * (b.seconds / b.worked if b.worked else mean) for b in self._bases.values())
        return work / max(1, self.slots)

    def __rich__(self) -> "Table":
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE, title=None, caption=self._speed(), caption_justify="left")
        table.add_column("base")
        states = [s for s in STATES if s == "done" or any(b.states[s] for b in self._bases.values())]
        for name in ("rows", "left", "run", *states, "s/row"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, base in self._bases.items():
            table.add_row(*self._cells(name, base, states))
        return table

    def _cells(self, name: str, base: _Base, states: Sequence[State]) -> Iterable[str]:
        from rich.markup import escape

        from lora_export.escape import shown

        note = " (being prepared)" if base.preparing else " (another driver prepares it)" if base.elsewhere else ""
        yield escape(shown(name) + note)
        yield str(base.rows)
        yield str(base.left or "")
        yield str(base.running + base.preparing or "")
        yield from (str(base.states[s] or "") for s in states)
        yield f"{base.seconds / base.worked:.1f}" if base.worked else ""


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def watched(board: Board, progress: Progress) -> Iterator[None]:
    """Show the board for as long as the fleet is driven: live on a terminal, else a line now and then."""
    with progress.showing(board) if isinstance(progress, Console) else contextlib.nullcontext():
        yield
