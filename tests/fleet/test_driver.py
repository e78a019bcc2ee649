"""The driver with slots that answer at once, and with real workers that go wrong."""

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from lora_export.contracts.fleet import FleetOptions, PlannedRow, RowOutcome, Task
from lora_export.errors import InputError
from lora_export.fleet import driver as driving
from lora_export.fleet import schedule
from lora_export.fleet.board import Board, duration
from lora_export.fleet.driver import drive
from lora_export.fleet.engines.local import LocalEngine
from lora_export.fleet.scratch import Budget
from lora_export.fleet.stores import opened
from tests.fleet import fakes
from tests.fleet.fakes import planned

Act = Callable[[Task, int], RowOutcome]


class Said:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, title: str) -> None:
        self.lines.append(title)

    def detail(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")

    def advance(self, done: int, total: int) -> None: ...


class Slot:
    """Answers from a thread of its own, as a worker would."""

    node, name = "here", ""

    def __init__(self, number: int, act: Act, log: list[tuple[int, str, str]]) -> None:
        self.number, self.act, self.log = number, act, log
        self.renewed = 0

    def submit(self, task: Task, timeout: float) -> "Future[RowOutcome]":
        future: Future[RowOutcome] = Future()
        name = task.planned.base_key if task.kind == "base" else task.planned.row.name
        self.log.append((self.number, task.kind, name))

        def answer() -> None:
            try:
                future.set_result(self.act(task, self.number))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=answer).start()
        return future

    def renew(self) -> None:
        self.renewed += 1

    def close(self) -> None: ...


class Engine:
    threads = 1

    def __init__(self, act: Act, count: int = 1) -> None:
        self.log: list[tuple[int, str, str]] = []
        self.slots = tuple(Slot(i, act, self.log) for i in range(count))

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def tasks(self) -> list[tuple[str, str]]:
        return [entry[1:] for entry in self.log]


def done(task: Task, slot: int = 0) -> RowOutcome:
    key = task.planned.base_key if task.kind == "base" else task.planned.key
    return RowOutcome(task.planned.row.name, key, "done", task.kind)


def sequence(*states: str) -> Act:
    """What becomes of the tasks of a row that is called odd, one after another; all else goes well."""
    left = iter(states)

    def act(task: Task, slot: int) -> RowOutcome:
        odd = task.kind == "row" and task.planned.row.name == "odd"
        return replace(done(task), state=next(left)) if odd else done(task)  # type: ignore[arg-type]

    return act


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "BACK_OFF", 0.01)
    monkeypatch.setattr(driving, "TICK", 0.01)
    monkeypatch.setattr(driving, "WAIT", 0.02)


def run(
    rows: Sequence[PlannedRow],
    engine: Engine | LocalEngine,
    root: Path,
    said: Said | None = None,
    **options: object,
) -> tuple[dict[str, RowOutcome], tuple[RowOutcome, ...]]:
    told, bases = drive(
        rows, engine, store=opened(str(root)), root=str(root), scratch=root.with_name("scratch"),
        options=FleetOptions(**options), board=Board(rows, said or Said(), len(engine.slots)),  # type: ignore[arg-type]
    )  # fmt: skip
    return {r.name: r for r in told}, bases


# --- order ---------------------------------------------------------------------------------------------------


def test_drive_base_comes_before_its_rows_and_largest_group_first(tmp_path: Path) -> None:
    engine = Engine(done)
    small = [planned("s1", base_key="S")]
    large = [planned(f"l{i}", base_key="L") for i in range(3)]
    rows, bases = run([*small, *large], engine, tmp_path / "root")
    assert engine.tasks == [
        ("base", "L"), ("row", "l0"), ("row", "l1"), ("row", "l2"), ("base", "S"), ("row", "s1"),
    ]  # fmt: skip
    assert list(rows) == ["s1", "l0", "l1", "l2"] and [b.key for b in bases] == ["L", "S"]


def test_drive_slot_keeps_its_base_and_idle_slots_help(tmp_path: Path) -> None:
    engine = Engine(lambda task, slot: (threading.Event().wait(0.01), done(task))[1], 2)
    rows = [planned(f"{b}{i}", base_key=b) for b in "AB" for i in range(8)]
    rows += [planned(f"B{i}", base_key="B") for i in range(8, 20)]
    run(rows, engine, tmp_path / "root")
    bases = [name[0] for slot, _, name in engine.log if slot == next(s for s, _, n in engine.log if n == "A")]
    assert len(list(itertools.groupby(bases))) == 2  # all of A, and then B
    assert len(engine.tasks) == 30


def test_drive_prepared_base_is_used(tmp_path: Path) -> None:
    root = tmp_path / "root"
    made = tmp_path / "made"
    made.mkdir()
    outcome = RowOutcome("first", "B", "done", "base")
    opened(str(root)).publish(made, "bases/B", fakes.Record(1, "B", {}, outcome, {}))
    engine = Engine(done)
    _, bases = run([planned("a", base_key="B")], engine, root)
    assert engine.tasks == [("row", "a")] and bases[0].state == "skipped"


def test_order_leaves_groups_that_are_being_prepared() -> None:
    groups = schedule.groups([planned("a", base_key="A"), planned("b", base_key="B"), planned("c")])
    groups[0].state = "preparing"
    assert groups[0] not in schedule.order(groups, 0) and len(list(schedule.order(groups, 0))) == 2


# --- what goes wrong -------------------------------------------------------------------------------------------


def test_drive_died_row_is_tried_again_on_another_slot(tmp_path: Path) -> None:
    engine = Engine(sequence("died", "done"), 2)
    rows, _ = run([planned("odd"), planned("even")], engine, tmp_path / "root")
    assert (rows["odd"].state, rows["odd"].attempts) == ("done", 2)
    assert len({slot for slot, _, name in engine.log if name == "odd"}) == 2


@pytest.mark.parametrize(
    ("states", "attempts"), [(("died",) * 3, 3), (("timeout",), 1), (("gate",), 1), (("refused",), 1)]
)
def test_drive_row_that_cannot_be_done_is_told_and_stops_no_other(
    tmp_path: Path, states: tuple[str, ...], attempts: int
) -> None:
    rows, _ = run([planned("odd"), planned("even")], Engine(sequence(*states)), tmp_path / "root", retries=2)
    assert (rows["odd"].state, rows["odd"].attempts, rows["even"].state) == (states[-1], attempts, "done")
    assert not (tmp_path / "root/names/odd.json").exists()


def test_drive_exception_of_the_work_is_told_as_died(tmp_path: Path) -> None:
    def act(task: Task, slot: int) -> RowOutcome:
        raise ValueError("three is not four")

    rows, _ = run([planned("odd")], Engine(act), tmp_path / "root", retries=0)
    assert "internal error" in str(rows["odd"].error) and "three is not four" in str(rows["odd"].error)


@pytest.mark.parametrize("state", ["refused", "gate", "died"])
def test_drive_base_that_cannot_be_prepared_leaves_its_rows_alone(tmp_path: Path, state: str) -> None:
    alone: list[str] = []

    def act(task: Task, slot: int) -> RowOutcome:
        alone.append(task.planned.alone)
        error = InputError("no engine knows it").as_json()
        return replace(done(task), state=state, error=error) if task.kind == "base" else done(task)  # type: ignore[arg-type]

    engine = Engine(act)
    rows, bases = run([planned(n, base_key="B") for n in "abc"], engine, tmp_path / "root", retries=1)
    assert engine.tasks[:2] == [("base", "B")] * 2  # a verdict: once more with another row; a death: a retry
    assert {r.state for r in rows.values()} == {"done"} and bases[0].state == state
    assert all("no engine knows it" in why for why in alone[2:])


def test_drive_base_refused_for_one_adapter_is_measured_with_another(tmp_path: Path) -> None:
    tried: list[str] = []

    def act(task: Task, slot: int) -> RowOutcome:
        if task.kind == "base":
            tried.append(task.planned.row.name)
            if task.planned.row.name == "a":
                return replace(done(task), state="refused")
        return done(task)

    _, bases = run([planned(n, base_key="B") for n in "ab"], Engine(act), tmp_path / "root")
    assert tried == ["a", "b"] and bases[0].state == "done"


def test_drive_base_that_takes_too_long_is_told_of_each_row(tmp_path: Path) -> None:
    def act(task: Task, slot: int) -> RowOutcome:
        return replace(done(task), state="timeout") if task.kind == "base" else done(task)

    rows, _ = run([planned("a", base_key="B"), planned("b")], Engine(act), tmp_path / "root")
    assert (rows["a"].state, rows["b"].state) == ("timeout", "done")
    assert "--timeout" in str((rows["a"].error or {})["next"])


def test_drive_store_error_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    monkeypatch.setattr(
        driving, "name_it",
        lambda store, name, key: store.replace("../x", b"") if name == "b" else None,
    )  # fmt: skip
    with pytest.raises(InputError):
        run([planned("a"), planned("b"), planned("c")], Engine(done), root)
    assert not list((root / "claims").rglob("*.json"))


# --- names, keys, verdicts ---------------------------------------------------------------------------------------


def test_drive_rows_of_one_key_are_done_once_and_named_each(tmp_path: Path) -> None:
    engine = Engine(done)
    rows, _ = run([planned("a", "same"), planned("b", "same")], engine, tmp_path / "root")
    assert [rows["a"].state, rows["b"].state] == ["done", "skipped"] and len(engine.tasks) == 1
    for name in "ab":
        named = json.loads((tmp_path / f"root/names/{name}.json").read_bytes())
        assert named == {"key": "same", "place": "objects/same"}


def test_drive_planned_verdicts_and_skips_are_left(tmp_path: Path) -> None:
    engine = Engine(done)
    rows, _ = run(
        [planned("a", state="skipped"), planned("b", state="gate"), planned("c")], engine, tmp_path / "root"
    )
    assert engine.tasks == [("row", "c")] and list(rows) == ["c"]


def test_name_it_that_is_right_is_not_written_again(tmp_path: Path) -> None:
    store = opened(str(tmp_path / "root"))
    driving.name_it(store, "a", "key")
    before = (tmp_path / "root/names/a.json").stat()
    driving.name_it(store, "a", "key")
    assert (tmp_path / "root/names/a.json").stat().st_ino == before.st_ino


# --- workers, scratch, what is told ------------------------------------------------------------------------------


def test_drive_worker_is_renewed_after_so_many_rows_or_when_it_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driving.ROWS_PER_WORKER == 50
    monkeypatch.setattr(driving, "ROWS_PER_WORKER", 5)
    engine = Engine(done)
    run([planned(f"r{i}") for i in range(11)], engine, tmp_path / "root")
    assert engine.slots[0].renewed == 2
    sizes = iter((10**8, 10**9, 2 * 10**9))
    engine = Engine(lambda task, slot: replace(done(task), memory_bytes=next(sizes)))
    run([planned(f"r{i}") for i in range(3)], engine, tmp_path / "other")
    assert engine.slots[0].renewed == 1


def test_drive_row_larger_than_the_disk_is_refused_in_words(tmp_path: Path) -> None:
    rows, _ = run([planned("a", nbytes=11), planned("b", nbytes=10)], Engine(done), tmp_path / "root", disk=10)
    assert (rows["a"].state, rows["b"].state) == ("refused", "done")
    assert "--disk" in str((rows["a"].error or {})["next"])


def test_drive_rows_together_stay_within_the_disk(tmp_path: Path) -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def act(task: Task, slot: int) -> RowOutcome:
        with lock:
            running[0] += task.planned.nbytes
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.15)  # longer than it takes to submit all
        with lock:
            running[0] -= task.planned.nbytes
        return done(task)

    run([planned(f"r{i}", nbytes=4) for i in range(4)], Engine(act, 4), tmp_path / "root", disk=10)
    assert most[0] == 8


def test_budget_counts_what_a_worker_holds(tmp_path: Path) -> None:
    held = tmp_path / "lora-export-fleet-slot-1-x"
    held.mkdir()
    (held / "file").write_bytes(os.urandom(100_000))
    budget = Budget(tmp_path, 250_000, {0: "slot", 1: "other"})
    assert budget.admit(0, 10) and budget.used() >= 100_000
    assert not budget.admit(1, 200_000) and budget.admit(1, 100_000)


def test_board_line_and_time_left() -> None:
    said = Said()
    rows = [planned(f"r{i}@x") for i in range(4)] + [planned("s", state="skipped")]
    board = Board(rows, said, slots=2)
    assert board.seconds_left() is None
    board.started(rows[0], "row")
    board.ended(rows[0], "row")
    board.finished(rows[0], replace(done(Task("row", rows[0], "", Path())), seconds=10.0, warnings=("odd graph",)))
    assert board.seconds_left() == 15.0
    assert board.line().startswith("2 of 5 rows (1 done, 1 skipped), 0 running")
    assert "warning: r0@x: odd graph" in said.lines
    assert [duration(s) for s in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


def test_board_says_one_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()
    clock = [0.0]
    monkeypatch.setattr("lora_export.fleet.board.time.monotonic", lambda: clock[0])
    rows = [planned(f"r{i}") for i in range(600)]
    board = Board(rows, said)
    for row in rows:  # ten minutes
        clock[0] += 1
        board.started(row, "row")
        board.ended(row, "row")
        board.finished(row, replace(done(Task("row", row, "", Path())), state="gate"))
        board.tick()
    lines = [line for line in said.lines if " of 600 rows" in line]
    assert len(lines) == 20 and len(said.lines) <= 20 + 20 + 1


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    with LocalEngine(fakes.WORK, 2, tmp_path / "scratch") as engine:
        yield engine


def test_drive_real_workers_poisoned_rows_are_blamed_alone(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKES_ONCE", str(tmp_path / "once"))
    names = ["ok-1", "exit0", "once", "segv", "sleep", "gate", "odd", "nan", "ok-2"]
    rows, bases = run([planned(n, base_key="B") for n in names], engine, tmp_path / "root", retries=1, timeout=0.5)
    assert {n: r.state for n, r in rows.items()} == {
        "ok-1": "done", "exit0": "died", "once": "done", "segv": "died", "sleep": "timeout", "gate": "gate",
        "odd": "died", "nan": "done", "ok-2": "done",
    }  # fmt: skip
    assert [r.attempts for r in rows.values()] == [1, 2, 2, 2, 1, 1, 2, 1, 1]
    whole = {p.parent.name for p in (tmp_path / "root/objects").glob("*/record.json")}
    assert whole == {f"{n}-key" for n in ("ok-1", "once", "nan", "ok-2")} and bases[0].state == "done"
