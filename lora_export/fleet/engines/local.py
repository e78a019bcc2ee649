"""Processes of this machine, by pebble: a pool of one process per slot.

So a slot keeps its worker, and with it what that holds in memory, from task to task; a death is the death of one
task; and a slot can be given a new worker. A pool lives as long as its one process: pebble's pipes are locked by
whoever uses them, and a process that dies at the wrong moment leaves them locked to the next one.
"""

import contextlib
import multiprocessing.context
import os
import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_export.contracts.fleet import RowOutcome, Task
from lora_export.errors import LoraExportError, WorkerLost
from lora_export.fleet.engines import workers
from lora_export.fleet.engines.sentry import Sentry, end_tree
from lora_export.fleet.scratch import folders_of, sweep
from lora_export.storage.disk import emptied
from lora_export.storage.interrupts import Interrupts
from lora_export.storage.workers import cores

if TYPE_CHECKING:
    from pebble import ProcessPool

STARTS = 3  # workers that may be lost before they have taken up a task
CORES_PER_WORKER = 2
_LAST_BYTES = 20000  # of a dead worker's log
_LAST_LINES, _FRAMES = 8, 3  # of a dead worker's log; of a crash, the innermost first
_EXIT_0 = 256  # of a worker that ended with status 0 in the middle of a task, which pebble would not notice
_REAPED = 5.0  # seconds for the kernel to have done with a process that is dead
_PATIENCE = 20.0  # seconds for a slot's thread to end


class _Process(multiprocessing.context.SpawnProcess):
    """A worker. It never ends by itself, so that status 0 is a death as any other."""

    @property
    def exitcode(self) -> int | None:
        code = super().exitcode
        return _EXIT_0 if code == 0 else code

    def terminate(self) -> None:
        """At once, with all that it has started: what it is in the middle of is not wanted."""
        if self.pid is not None:
            end_tree(self.pid, self.exitcode is None)


class _Spawn(multiprocessing.context.SpawnContext):
    """Makes one process, which it remembers; pebble gives the pool up if that dies."""

    def __init__(self) -> None:
        super().__init__()
        self.made: _Process | None = None

    def Process(self, *args: Any, **named: Any) -> _Process:  # type: ignore[override]
        if self.made is not None:
            raise OSError("this pool has had its worker")
        self.made = _Process(*args, **named)
        return self.made


@dataclass(frozen=True)
class _Order:
    task: Task
    timeout: float
    future: "Future[RowOutcome]"


class LocalSlot:
    """One worker at a time, and a thread that waits for it."""

    def __init__(self, work: str, settings: workers.Start, sentry: Sentry) -> None:
        self.node = socket.gethostname()
        self.name = settings.name
        self._work, self._settings, self._sentry = work, settings, sentry
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._pool: ProcessPool | None = None
        self._spawn = _Spawn()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"slot {settings.name}")
        self._thread.start()

    def submit(self, task: Task, timeout: float) -> "Future[RowOutcome]":
        future: Future[RowOutcome] = Future()
        future.set_running_or_notify_cancel()
        self._orders.put(_Order(task, timeout, future))
        return future

    def renew(self) -> None:
        self._orders.put(None)

    def close(self) -> None:
        self._closed = True
        if (made := self._spawn.made) is not None:
            made.terminate()
        self._orders.put(None)
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while True:
            order = self._orders.get()
            if order is not None:
                try:
                    order.future.set_result(self._done(order))
                except BaseException as error:
                    order.future.set_exception(error)
            else:
                self._end()
            if self._closed and self._orders.empty():
                self._end()
                return

    def _done(self, order: _Order) -> RowOutcome:
        """What became of a task. A worker that is lost before it takes the task up is replaced."""
        started = time.monotonic()
        for _ in range(STARTS):
            if self._closed:
                return self._lost(
                    order, "died", started, WorkerLost("the fleet was ended in the middle of this row")
                )
            kills = _out_of_memory_kills()
            try:
                pool = self._started()
                answer = pool.schedule(
                    workers.perform, args=(self._work, order.task), timeout=order.timeout
                ).result()
            except FutureTimeout:
                return self._lost(order, "timeout", started, _too_long(order.timeout))
            except BrokenProcessPool:  # lost before it took the task up
                error = self._how_it_ended(kills, "before it took up this row")
                self._end()
            except OSError:  # pebble's ProcessExpired
                if self._closed:
                    continue
                return self._lost(order, "died", started, self._how_it_ended(kills, "in the middle of this row"))
            except RuntimeError:  # lost while it was idle
                error = self._how_it_ended(kills, "before it took up this row")
                self._end()
            else:
                return self._answered(order, answer)
        return self._lost(order, "died", started, error)

    def _answered(self, order: _Order, answer: workers.Answer) -> RowOutcome:
        if answer.outcome is None:
            self._end()  # nobody knows what the exception has left behind
            raise WorkerLost(answer.error, where=answer.where or self._who())
        return replace(
            answer.outcome,
            memory_bytes=answer.outcome.memory_bytes or answer.rss,
            worker=answer.outcome.worker or self._who(),
        )

    def _who(self) -> str:
        made = self._spawn.made
        return f"{self.node}/{made.pid if made else 0}"

    def _lost(
        self, order: _Order, state: Literal["died", "timeout"], started: float, error: LoraExportError
    ) -> RowOutcome:
        planned, who = order.task.planned, self._who()
        self._end()
        return RowOutcome(
            name=planned.row.name,
            key=planned.base_key if order.task.kind == "base" else planned.key,
            state=state,
            kind=order.task.kind,
            seconds=time.monotonic() - started,
            error=error.as_json(),
            worker=who,
        )

    def _started(self) -> "ProcessPool":
        """The pool with its process, a new one where that is lost."""
        from pebble import ProcessPool

        if self._pool is None or not self._pool.active:
            self._end()
            self._spawn = _Spawn()
            self._pool = ProcessPool(
                max_workers=1, initializer=workers.start, initargs=(self._settings,), context=self._spawn
            )
            started = self._pool.active  # it starts its process now, in this thread
            if started and self._spawn.made is not None and self._spawn.made.pid is not None:
                self._sentry.add(self._spawn.made.pid)
                if self._closed:
                    self._spawn.made.terminate()
        return self._pool

    def _how_it_ended(self, kills: int, when: str) -> WorkerLost:
        """How a worker ended, with the last lines of what its libraries printed."""
        made = self._spawn.made
        if made is not None:
            made.join(_REAPED)
        code = made.exitcode if made is not None else None
        lines = [
            line
            for folder in folders_of(self._settings.scratch, self.name)
            for line in _last_lines(folder / workers.LOG)
        ]
        how = f"the worker ended {_in_words(code, _out_of_memory_kills() > kills)} {when}"
        return WorkerLost(f"{how}; the last it said: {' | '.join(lines)}" if lines else how, where=self._who())

    def _end(self) -> None:
        """End the worker, its children and its folder; the next task gets a new one."""
        pool, made = self._pool, self._spawn.made
        self._pool = None
        if made is not None and made.pid is not None:
            made.terminate()
            made.join(_REAPED)
        if pool is not None:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()
        if made is not None and made.pid is not None:
            self._sentry.drop(made.pid)
        for folder in folders_of(self._settings.scratch, self.name):
            emptied(folder)


class LocalEngine:
    """So many slots on this machine, which share out its cores.

    work: MODULE:NAME of a `Work`; count: of workers, None for one for every two cores; most: tasks that there are.
    `with` ends all workers.
    """

    def __init__(self, work: str, count: int | None, scratch: Path, *, most: int | None = None) -> None:
        available = usable_cores()
        count = count or default_workers()
        count = count if most is None else max(1, min(count, most))
        self.threads = max(1, len(available) // count)
        token = secrets.token_hex(8)
        self._sentry = Sentry(scratch)
        sweep(scratch)
        self._scratch = scratch
        self.slots: tuple[LocalSlot, ...] = tuple(
            LocalSlot(
                work,
                workers.Start(
                    os.getpid(), _share(available, i, self.threads), self.threads, scratch, f"{token}.{i}"
                ),
                self._sentry,
            )
            for i in range(count)
        )

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *error: object) -> None:
        with Interrupts():  # Ctrl-C waits for the second that this takes
            for slot in self.slots:
                slot.close()
            self._sentry.close()
            sweep(self._scratch)


def default_workers() -> int:
    """How many workers this machine has where nobody says."""
    return max(1, len(usable_cores()) // CORES_PER_WORKER)


def usable_cores() -> tuple[int, ...]:
    """The cores that this process may use, not more than its container's quota."""
    all_ = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores()))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return tuple(all_[: max(1, int(quota) // int(period))])
    return tuple(all_)


def _share(available: Sequence[int], slot: int, threads: int) -> tuple[int, ...]:
    """The cores of a slot. More slots than cores take turns on them."""
    return tuple(available[(slot * threads + i) % len(available)] for i in range(threads))


def _too_long(timeout: float) -> WorkerLost:
    return WorkerLost(
        f"not done within {timeout:g} s; its worker was ended",
        expected="a row that is done in time",
        next_step="give it longer with --timeout; the same command tries it again",
    )


def _in_words(code: int | None, out_of_memory: bool) -> str:
    if code is None:
        return "without a status"
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            lack = ", for lack of memory" if out_of_memory else ""
            return f"by signal {-code} ({name}{lack})"
    return f"with status {0 if code == _EXIT_0 else code}"


def _out_of_memory_kills() -> int:
    """How many processes the kernel has ended for lack of memory."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _last_lines(log: Path) -> list[str]:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
        text = file.read().decode("utf-8", errors="replace").replace("\r", "\n")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        crash = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
        if crash is None:
            return lines[-_LAST_LINES:]
        return [lines[crash], *[line for line in lines[crash:] if line.startswith("File ")][:_FRAMES]]
    return []
