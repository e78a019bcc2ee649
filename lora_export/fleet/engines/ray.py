"""Workers on a Ray cluster: slots that carry tasks out in processes of its nodes.

Ray places a worker, carries a task to it and the outcome back, and says when the worker is lost. It restarts and
repeats nothing: the driver of the fleet does. Weights never enter Ray's memory.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.contracts.fleet import RowOutcome, Task
from lora_export.errors import LoraExportError, WorkerLost
from lora_export.fleet.engines import ray_words as words
from lora_export.fleet.engines.protocol import Work
from lora_export.fleet.engines.ray_cluster import connect, library, room, secret_variables
from lora_export.fleet.engines.ray_worker import ROOT_ID, Introduction, Meeting, RayWorker, versions
from lora_export.fleet.engines.workers import Answer
from lora_export.fleet.stores.protocol import opened
from lora_export.storage.workers import cores

START_SECONDS = 180.0  # for the first worker of all
ROOM_SECONDS = 300.0  # with no worker anywhere, until the fleet gives up
STARTS = 4  # workers that may be lost before they have taken up a task
_OTHERS = 15.0  # seconds that are spent on waiting for the others
_PATIENCE = 10.0  # seconds that a slot waits for room before it takes over a worker that idles


@dataclass(eq=False)
class _Worker:
    """actor: Ray's handle; begun: of its first answer, `told`; place: among the workers of its node."""

    actor: Any
    begun: Any
    told: Introduction | None = None
    place: int = 0

    @property
    def name(self) -> str:
        return f"{self.told.node}/{self.told.pid}" if self.told else ""


class RayEngine:
    """Slots on a Ray cluster. `slots` and `threads` are known inside `with`.

    on: `ray` or ray://HOST:PORT; work: a function that workers import by its name; workers: None: as many as there
    is room for; root: of the fleet; needed: other files and folders that every node must see where the driver does.
    RuntimeUnavailable if Ray is not installed, no cluster answers, or a node has other versions; InputError if one
    does not see the root or what is needed.
    """

    def __init__(
        self, on: str, work: Work, *, workers: int | None = None, root: str = "", needed: Sequence[Path] = ()
    ) -> None:
        self.work = f"{work.__module__}:{work.__qualname__}"
        self.slots: tuple[RaySlot, ...] = ()
        self.threads = 1
        self.lock = threading.RLock()
        self.closed = False
        self.ray: Any = None
        self._on, self._workers, self._root = on, workers, root
        self._needed = tuple(str(p.absolute()) for p in needed)
        self._here = False
        self._meeting = Meeting()
        self._placed: list[_Worker] = []
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> "RayEngine":
        self.ray = library()
        with contextlib.ExitStack() as stack:
            self._here = connect(self.ray, self._on, max(self._workers or 1, cores()), stack)
            self._meeting = self._met()
            self.threads, count = room(self.ray, self._workers)
            self.slots = tuple(RaySlot(self) for _ in range(count))
            stack.callback(self._end_all)
            self._start_all()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def _start_all(self) -> None:
        """Start the workers, and wait for those that Ray has room for."""
        workers = [slot.start() for slot in self.slots]
        begun = [worker.begun for worker in workers]
        ready, _ = self.ray.wait(begun, num_returns=1, timeout=START_SECONDS)
        if not ready:
            raise words.no_room(self.threads, START_SECONDS)
        ready, _ = self.ray.wait(begun, num_returns=len(begun), timeout=_OTHERS)
        lost: list[Exception] = []
        for worker in workers:
            if worker.begun in ready:
                try:
                    self.greet(worker)
                except self.ray.exceptions.RayError as error:  # its slot starts another
                    lost.append(error)
        if len(lost) == len(workers):
            raise words.no_worker(lost[0]) from lost[0]

    def _end_all(self) -> None:
        """Threads that wait for Ray are gone before the connection is."""
        self.closed = True
        for slot in self.slots:
            slot.close()
        for slot in self.slots:
            slot.join(10)

    def _met(self) -> Meeting:
        """What workers are given at their beginning; other machines have to see the same root."""
        folder = str(Path.cwd())
        if self._here:
            return Meeting(folder=folder)
        meeting = Meeting(secret_variables(os.environ), needed=self._needed, folder=folder)
        if not self._root:
            return meeting
        store, token = opened(self._root), secrets.token_hex(16).encode()
        if not store.create(ROOT_ID, token):
            token = store.read(ROOT_ID) or b""
        return replace(meeting, root=self._root, token=token.decode())

    def actor(self, gpus: int = 0) -> _Worker:
        """A worker that Ray starts where it has room. One for a measurement has its slot's cores."""
        room_for = {"num_cpus": 0 if gpus else self.threads, "num_gpus": gpus}
        actor = self.ray.remote(max_restarts=0, max_task_retries=0, **room_for)(RayWorker).remote()
        return _Worker(actor, actor.begin.remote(self._meeting))

    def greet(self, worker: _Worker) -> Introduction:
        """Hear a worker's first answer, which is there. LoraExportError if it cannot work for this driver; an error
        of Ray if it is lost."""
        told: Introduction = self.ray.get(worker.begun)
        if other := words.other_versions(told.node, told.versions, versions()):
            raise other
        if told.root:
            raise words.other_root(told.node, told.root, self._root)
        if told.missing:
            raise words.unseen(told.node, told.missing)
        with self.lock:
            taken = {w.place for w in self._placed if w.told and w.told.node == told.node}
            worker.place = min(set(range(len(taken) + 1)) - taken)
            worker.told = told
            self._placed.append(worker)
        return told

    def end(self, worker: _Worker) -> None:
        with self.lock:
            if worker in self._placed:
                self._placed.remove(worker)
        with contextlib.suppress(Exception):  # of a cluster that is gone
            self.ray.kill(worker.actor)

    def idle_worker(self, asking: "RaySlot") -> _Worker | None:
        """The worker of a slot without a task: where a node was lost there is no room for every slot."""
        with self.lock:
            for slot in self.slots:
                worker = slot.worker
                if slot is not asking and not slot.busy and worker and worker.told:
                    slot.worker = None
                    return worker
        return None

    def has_worker(self) -> bool:
        return bool(self._placed)

    def has_gpu(self) -> bool:
        return any(n["Alive"] and n["Resources"].get("GPU", 0) >= 1 for n in self.ray.nodes())


class RaySlot:
    """Room for one task at a time, in a worker that Ray placed on a node."""

    name = ""  # its workers' folders may be on another machine

    def __init__(self, engine: RayEngine) -> None:
        self.worker: _Worker | None = None
        self.busy = False
        self._engine = engine
        self._node = ""
        self._thread: threading.Thread | None = None

    @property
    def node(self) -> str:
        """The name of the machine, that of the last worker while there is none."""
        worker = self.worker
        if worker and worker.told:
            self._node = worker.told.node
        return self._node

    def start(self) -> _Worker:
        self.worker = worker = self._engine.actor()
        return worker

    def submit(self, task: Task, timeout: float) -> "Future[RowOutcome]":
        future: Future[RowOutcome] = Future()
        future.set_running_or_notify_cancel()
        with self._engine.lock:
            self.busy = True
        self._thread = threading.Thread(target=self._serve, args=(future, task, timeout), daemon=True)
        self._thread.start()
        return future

    def renew(self) -> None:
        self.close()

    def close(self) -> None:
        with self._engine.lock:
            worker, self.worker = self.worker, None
        if worker:
            self._engine.end(worker)

    def join(self, seconds: float) -> None:
        if self._thread:
            self._thread.join(seconds)

    def _serve(self, future: "Future[RowOutcome]", task: Task, timeout: float) -> None:
        outcome: RowOutcome | None = None
        error: BaseException | None = None
        try:
            outcome = self._carry_out(task, timeout)
        except BaseException as caught:
            error = caught
        with self._engine.lock:
            self.busy = False
        if error is not None:
            future.set_exception(error)
        elif outcome is not None:
            future.set_result(outcome)

    def _carry_out(self, task: Task, timeout: float) -> RowOutcome:
        engine, ray = self._engine, self._engine.ray
        apart = measures_on_gpu(task) and engine.has_gpu()
        worker = self._with_gpu(timeout) if apart else self._own()
        started = time.monotonic()
        try:
            asked = worker.actor.carry_out.remote(engine.work, task, worker.place)
            answer: Answer = ray.get(asked, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            self._lose(worker)
            return words.lost(task, "timeout", f"it took longer than {timeout:g} s", timeout, worker.name)
        except ray.exceptions.RayError as error:
            self._lose(worker)
            return words.lost(task, "died", words.how(error), time.monotonic() - started, worker.name)
        if apart:
            engine.end(worker)
        if answer.outcome is None:
            raise WorkerLost(answer.error, where=answer.where or worker.name)
        outcome = answer.outcome
        return replace(
            outcome, worker=outcome.worker or worker.name, memory_bytes=outcome.memory_bytes or answer.rss
        )

    def _lose(self, worker: _Worker) -> None:
        """End a worker for good, as Ray may only have lost sight of it; another starts in its place."""
        self._engine.end(worker)
        with self._engine.lock:
            mine = self.worker is worker
            if mine:
                self.worker = None
        if mine and not self._engine.closed:
            with contextlib.suppress(Exception):  # of a cluster that is gone: the next task tells it
                self.start()

    def _own(self) -> _Worker:
        """This slot's worker, which is alive. One that is lost before it takes a task up is no row's fault."""
        error: BaseException | None = None
        for attempt in range(STARTS):
            time.sleep(attempt)
            try:
                worker = self._begun()
                self._engine.ray.get(worker.actor.ping.remote(), timeout=START_SECONDS)
                return worker
            except LoraExportError:
                self.close()
                raise
            except Exception as lost:  # Ray's, with a dozen classes for it
                error = lost
                if self.worker:
                    self._lose(self.worker)
        raise words.no_worker(error) from error

    def _begun(self) -> _Worker:
        """This slot's worker after its first answer. Waits for room, or takes a worker over that idles."""
        engine, since = self._engine, time.monotonic()
        worker = self.worker or self.start()
        while not worker.told:
            ready, _ = engine.ray.wait([worker.begun], timeout=_PATIENCE)
            if ready:
                engine.greet(worker)
            elif other := engine.idle_worker(self):
                engine.end(worker)
                self.worker = worker = other
            elif time.monotonic() - since > ROOM_SECONDS and not engine.has_worker():
                raise words.no_room(engine.threads, ROOM_SECONDS)
        return worker

    def _with_gpu(self, timeout: float) -> _Worker:
        """A worker for one task, with a GPU that no other measurement has."""
        engine = self._engine
        worker = engine.actor(gpus=1)
        ready, _ = engine.ray.wait([worker.begun], timeout=timeout)
        if not ready:
            engine.end(worker)
            raise words.no_room(0, timeout)
        engine.greet(worker)
        return worker


def measures_on_gpu(task: Task) -> bool:
    """Whether a task measures with CUDA because its options say so; a row that shares a base has no measurement."""
    provider = task.planned.row.options.export.provider
    return provider == "cuda" and (task.kind == "base" or not task.planned.base_key)
