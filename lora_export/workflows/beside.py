"""Stages beside a run's own thread: what the engines' process makes, while this one compares models."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar, overload

import psutil

from lora_export.contracts import Progress
from lora_export.progress import Turns
from lora_export.storage.workers import cores

T = TypeVar("T")
_COPIES = 6  # of the weights in fp32: three that validation compares, two of a proof, one to spare
Stage = Callable[[Progress], T]


class Beside:
    """One thread beside the run's own, which carries out one stage after another.

    As a context manager it leaves nothing running: what nobody has asked for is stopped. An error of a stage is
    raised where its result is asked for; where the block ends with a later error, the first one is raised.
    """

    def __init__(self, progress: Progress, stop: Callable[[], None], *, at_once: bool) -> None:
        """stop: has a running stage fail soon; at_once: whether there is that thread at all, or each stage runs in
        the place where it is begun or asked for."""
        self._turns, self._stop, self._at_once = Turns(progress), stop, at_once
        self._pool = ThreadPoolExecutor(1, "beside")
        self._begun: list[Future[Any]] = []

    @property
    def progress(self) -> Progress:
        """For the run's own thread."""
        return self._turns

    def begin(self, stage: Stage[T], *, spare: bool = False) -> "Later[T]":
        """Have a stage run. spare: nobody may need it, so that without a thread of its own it is not begun before
        it is asked for."""
        if not self._at_once:
            later = Later(lambda: stage(self._turns))
            if not spare:
                later.result()
            return later
        future = self._pool.submit(self._run, stage)
        self._begun.append(future)
        return Later(future.result)

    def _run(self, stage: Stage[T]) -> T:
        try:
            return stage(self._turns.beside)
        finally:
            self._turns.beside.over()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        first = next((e for f in self._begun if f.done() and (e := f.exception()) is not None), None)
        if not all(f.done() for f in self._begun):
            self._turns.stop()
            self._stop()
        self._pool.shutdown(cancel_futures=True)
        if first is not None and first is not error and isinstance(error, Exception):
            raise first from error


class Later(Sequence[T]):
    """What a stage makes. As a sequence it has one item, and only the one who takes it waits."""

    def __init__(self, result: Callable[[], T]) -> None:
        self._result = result
        self._made: list[T] = []

    def result(self) -> T:
        """Wait for it. Raises what the stage raised."""
        if not self._made:
            self._made.append(self._result())
        return self._made[0]

    def __len__(self) -> int:
        return 1

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...

    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        return [self.result()][at]


def fits(weights: int, max_memory: int | None) -> bool:
    """Whether models of so many bytes in fp32 can be compared while the engines' process makes others.

    max_memory: bytes for weights, None for half of what the machine has available. A single core gains nothing.
    """
    limit = psutil.virtual_memory().available // 2 if max_memory is None else max_memory
    return cores() > 1 and _COPIES * weights <= limit
