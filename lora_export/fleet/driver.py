"""The driver of a fleet: gives tasks to an engine's slots until it is known what became of every row."""

import contextlib
import json
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from lora_export import records
from lora_export.contracts.fleet import FleetOptions, PlannedRow, RowOutcome, State, Task
from lora_export.errors import InputError, LoraExportError, WorkerLost
from lora_export.fleet import schedule
from lora_export.fleet.board import Board
from lora_export.fleet.claims import Claims
from lora_export.fleet.engines.protocol import Engine
from lora_export.fleet.schedule import Group, Item
from lora_export.fleet.scratch import Budget
from lora_export.fleet.stores.protocol import Store

TICK = 0.25  # seconds between two looks at what waits for somebody else
LOOKS = 8  # rows of somebody else that a slot is kept waiting for
WAIT = 1.0  # seconds until what somebody else works on is looked at again
BACK_OFF = 0.5  # seconds before the first retry, twice as long before each next one
LONGEST_BACK_OFF = 30.0
ROWS_PER_WORKER = 50
GROWTH = 10**9  # bytes of memory that a worker may gain

Kind = Literal["base", "row"]


def drive(
    planned: Sequence[PlannedRow], engine: Engine, *, store: Store, root: str, scratch: Path,
    options: FleetOptions, board: Board,
) -> tuple[tuple[RowOutcome, ...], tuple[RowOutcome, ...]]:  # fmt: skip
    """Do the planned rows that have no state: an outcome each, in their order, and those of the preparations.

    A row never stops another, and no exception of a worker ends this; those of the store do, as nothing can be kept
    then, and what is whole by then stays. KeyboardInterrupt leaves at once; the caller ends the engine.
    """
    with Claims(store) as claims:
        run = _Run(engine, store, claims, root, scratch, options, board)
        run.all(planned)
    rows = tuple(run.rows[p.row.name] for p in planned if p.state is None)
    return rows, tuple(run.bases.values())


@dataclass
class _Slot:
    """What a slot is at. count, first_memory: tasks of its worker, and the bytes that it had after the first;
    budget: of the node that its task runs on."""

    group: Group | None = None
    item: Item | None = None
    kind: Kind = "row"
    count: int = 0
    first_memory: int = 0
    budget: Budget | None = None


class _Run:
    def __init__(
        self, engine: Engine, store: Store, claims: Claims, root: str, scratch: Path, options: FleetOptions,
        board: Board,
    ) -> None:  # fmt: skip
        self.engine, self.store, self.claims = engine, store, claims
        self.root, self.scratch, self.options, self.board = root, scratch, options, board
        self.slots = [_Slot() for _ in engine.slots]
        self._names = {i: slot.name for i, slot in enumerate(engine.slots) if slot.name}
        self.budgets: dict[str, Budget] = {}
        self.arrived: queue.SimpleQueue[tuple[int, Future[RowOutcome]]] = queue.SimpleQueue()
        self.rows: dict[str, RowOutcome] = {}
        self.bases: dict[str, RowOutcome] = {}
        self.groups: list[Group] = []

    def all(self, planned: Sequence[PlannedRow]) -> None:
        self.groups = schedule.groups(planned)
        self._refuse_too_large()
        while any(g.items for g in self.groups) or any(s.item for s in self.slots):
            for index, slot in enumerate(self.slots):
                if slot.item is None:
                    self._give(index)
            self._wait()
            self.board.tick()

    # --- what is next ----------------------------------------------------------------------------------------

    def _give(self, index: int) -> None:
        """Give an idle slot what it can do, if there is anything."""
        for group in schedule.order(self.groups, index):
            item = self._base(group, index) if group.state == "new" else self._row(group, index)
            if item is None:
                continue
            slot = self.slots[index]
            self._join(group, index)
            slot.group, slot.item, slot.kind = group, item, "base" if group.state == "preparing" else "row"
            self._submit(index, item.planned, slot.kind)
            return

    def _join(self, group: Group, index: int) -> None:
        for other in self.groups:
            other.slots.discard(index)
        group.slots.add(index)

    def _base(self, group: Group, index: int) -> Item | None:
        """The row that a base is to be prepared with; or a row of it, if it is prepared meanwhile."""
        now = time.monotonic()
        if not schedule.may(group, index, len(self.slots), now):
            return None
        key = _base_claim(group.base_key)
        if not self._admitted(index, group.items[0]):
            return None
        if not self.claims.take(key):
            self._release(index)
            group.ready_at = now + WAIT
            self.board.waiting(group.base_key)
            return None
        raw = self.store.read(f"bases/{group.base_key}/{records.NAME}")
        if raw is None:
            group.state = "preparing"
            return group.items[0]
        self._release(index)
        self.claims.give_back(key)
        known = records.decoded(raw, f"{self.store.where}/bases/{group.base_key}").outcome
        self._prepared(group, replace(known, state="skipped"))
        return self._row(group, index)

    def _row(self, group: Group, index: int) -> Item | None:
        for item in islice(schedule.ready(group, index, len(self.slots), time.monotonic()), LOOKS):
            if not self._admitted(index, item):
                return None
            if self._mine(item):
                group.items.remove(item)
                return item
            self._release(index)
            group.items.remove(item)
            if item.planned.row.name not in self.rows:
                group.items.append(item)  # somebody else is at it, and may be done with it by then
        return None

    def _mine(self, item: Item) -> bool:
        """Whether nobody else works on a row or has done it; if somebody has, it is finished here."""
        key, claim = item.planned.key, _row_claim(item.planned.key)
        if not self.claims.take(claim):
            if item.verdict is None:
                item.verdict = self.store.read(f"failed/{key}/{records.NAME}") or b""
            item.ready_at = time.monotonic() + WAIT
            return False
        if self.store.read(f"objects/{key}/{records.NAME}") is not None:
            self._finish(item, RowOutcome(item.planned.row.name, key, "skipped"))
            return False
        if item.verdict is not None:
            raw = self.store.read(f"failed/{key}/{records.NAME}")
            if raw is not None and raw != item.verdict:
                self._finish(item, records.decoded(raw, f"{self.store.where}/failed/{key}").outcome)
                return False
        return True

    # --- scratch -----------------------------------------------------------------------------------------------

    def _refuse_too_large(self) -> None:
        """Refuse rows that fit into no node's scratch."""
        for group in self.groups:
            for item in list(group.items):
                refusals = [self._budget(i).refusal(item.planned.nbytes) for i in range(len(self.slots))]
                error = refusals[0]
                if error is not None and all(refusals):
                    group.items.remove(item)
                    self._finish(item, _outcome(item.planned, "refused", error))

    def _admitted(self, index: int, item: Item) -> bool:
        budget = self._budget(index)
        if budget.refusal(item.planned.nbytes) is not None:
            return False
        if budget.admit(index, item.planned.nbytes):
            self.slots[index].budget = budget
            return True
        for other, slot in enumerate(self.slots):  # what idle workers hold makes room
            if slot.item is None and other != index and budget.held(other):
                self._renew(other)
        return False

    def _release(self, index: int) -> None:
        if (budget := self.slots[index].budget) is not None:
            budget.release(index)

    def _budget(self, index: int) -> Budget:
        """Of the node that a slot is on, which may change. Only this machine's scratch can be measured."""
        slot = self.engine.slots[index]
        if slot.node not in self.budgets:
            here = self.scratch if slot.name else None
            self.budgets[slot.node] = Budget(here, self.options.disk, self._names if slot.name else {})
        return self.budgets[slot.node]

    # --- tasks -------------------------------------------------------------------------------------------------

    def _submit(self, index: int, planned: PlannedRow, kind: Kind) -> None:
        task = Task(kind, planned, self.root, self.scratch, self.engine.threads)
        self.board.started(planned, kind)
        future = self.engine.slots[index].submit(task, self.options.timeout)
        future.add_done_callback(lambda done: self.arrived.put((index, done)))

    def _wait(self) -> None:
        """Take what has arrived, after a moment's wait for it."""
        timeout: float | None = TICK
        with contextlib.suppress(queue.Empty):
            while True:
                index, future = self.arrived.get(timeout=timeout) if timeout else self.arrived.get_nowait()
                self._arrived(index, future)
                timeout = None

    def _arrived(self, index: int, future: "Future[RowOutcome]") -> None:
        slot = self.slots[index]
        group, item, kind = slot.group, slot.item, slot.kind
        assert group is not None and item is not None
        slot.item = None
        self._release(index)
        try:
            outcome = future.result()
        except Exception as error:
            outcome = _outcome(item.planned, "died", _as_ours(error), kind)
        self.board.ended(item.planned, kind)
        self._look_after(index, outcome)
        if kind == "base":
            self._base_ended(group, item, outcome, index)
        else:
            self._row_ended(group, item, outcome, index)

    def _row_ended(self, group: Group, item: Item, outcome: RowOutcome, index: int) -> None:
        item.attempts += 1
        if outcome.state == "died" and item.attempts <= self.options.retries:
            item.ready_at = time.monotonic() + _back_off(item.attempts)
            item.avoid = index
            group.items.append(item)
            self.board.again(item.planned, outcome)
        else:
            self._finish(item, replace(outcome, attempts=item.attempts))

    def _base_ended(self, group: Group, item: Item, outcome: RowOutcome, index: int) -> None:
        key = group.base_key
        group.state = "new"
        group.attempts += 1
        if outcome.state in ("done", "skipped"):
            self._prepared(group, replace(outcome, attempts=group.attempts))
        elif outcome.state == "died" and group.attempts <= self.options.retries:
            group.ready_at = time.monotonic() + _back_off(group.attempts)
            group.avoid = index
            self.board.again(item.planned, outcome)
            return
        elif outcome.state in ("refused", "gate") and group.tries == 0 and len(group.items) > 1:
            group.tries += 1  # it may have been the adapter's fault that it is measured with
            group.items.rotate(-1)
            return
        else:
            self._unprepared(group, replace(outcome, attempts=group.attempts))
        self.claims.give_back(_base_claim(key))

    def _prepared(self, group: Group, outcome: RowOutcome) -> None:
        group.state = "ready"
        self.bases[group.base_key] = outcome
        self.board.prepared(group.base_key, outcome)

    def _unprepared(self, group: Group, outcome: RowOutcome) -> None:
        """A base that cannot be prepared: its rows do without, unless there is no time for that either."""
        self.bases[group.base_key] = outcome
        self.board.prepared(group.base_key, outcome)
        what = str((outcome.error or {}).get("found") or outcome.state)
        if outcome.state != "timeout":
            group.alone(f"its base could not be prepared for all: {what}")
            return
        error = WorkerLost(
            f"the preparation of its base was {what}",
            expected="a base that is prepared in time",
            next_step="give it longer with --timeout; the same command tries it again",
        )
        while group.items:
            item = group.items.popleft()
            self._finish(item, _outcome(item.planned, "timeout", error))

    def _finish(self, item: Item, outcome: RowOutcome) -> None:
        """What became of an object, for each row that names it."""
        for number, row in enumerate(item.rows):
            told = replace(outcome, name=row.row.name, key=row.key)
            if number and outcome.state == "done":
                told = replace(told, state="skipped", seconds=0.0)
            self.rows[row.row.name] = told
            if outcome.state in ("done", "skipped"):
                name_it(self.store, row.row.name, row.key)
            self.board.finished(row, told)
        self.claims.give_back(_row_claim(item.planned.key))

    def _look_after(self, index: int, outcome: RowOutcome) -> None:
        """Give a slot a new worker after so many rows, or when its memory has grown."""
        slot = self.slots[index]
        if outcome.state in ("died", "timeout"):  # it has a new one already
            slot.count = slot.first_memory = 0
            return
        slot.count += 1
        slot.first_memory = slot.first_memory or outcome.memory_bytes
        if slot.count >= ROWS_PER_WORKER or outcome.memory_bytes - slot.first_memory > GROWTH:
            self._renew(index)

    def _renew(self, index: int) -> None:
        self.engine.slots[index].renew()
        self.slots[index].count = self.slots[index].first_memory = 0


def name_it(store: Store, name: str, key: str) -> None:
    """Have a name lead to an object that is whole; nothing is written where it does."""
    content = (json.dumps({"key": key, "place": f"objects/{key}"}) + "\n").encode()
    if store.read(f"names/{name}.json") != content:
        store.replace(f"names/{name}.json", content)


def _outcome(planned: PlannedRow, state: State, error: LoraExportError, kind: Kind = "row") -> RowOutcome:
    key = planned.base_key if kind == "base" else planned.key
    return RowOutcome(planned.row.name, key, state, kind, error=error.as_json())


def _as_ours(error: Exception) -> LoraExportError:
    """The exception of a task in our words."""
    if isinstance(error, LoraExportError):
        return error
    return InputError(f"internal error, please report it: {type(error).__name__}: {error}")


def _back_off(attempts: int) -> float:
    return min(LONGEST_BACK_OFF, BACK_OFF * 2.0 ** (attempts - 1))


def _base_claim(key: str) -> str:
    return f"bases-{key}"


def _row_claim(key: str) -> str:
    return f"objects-{key}"
