"""What the driver of a fleet asks of an engine."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from lora_export.contracts.fleet import RowOutcome, Task

Work = Callable[[Task], RowOutcome]  # a function of a module: workers import it


class Slot(Protocol):
    """Room for one task at a time, in a worker process that is kept for many: its imports and the base that it
    holds in memory stay. A worker that died is replaced before the next task."""

    @property
    def node(self) -> str:
        """Whose scratch it uses."""

    @property
    def name(self) -> str:
        """Of its workers' folders there (`scratch.folders_of`), "" where this machine does not see them."""

    def submit(self, task: Task, timeout: float) -> "Future[RowOutcome]":
        """A future that never raises for what happens to the worker: a dead one is an outcome `died` with how it
        ended (signal or exit status), one that took longer than `timeout` seconds is ended and is `timeout`. An
        exception of `Work` itself is a fault of ours, and is raised."""

    def renew(self) -> None:
        """End the idle worker; the next task gets a new one."""

    def close(self) -> None:
        """End the worker, with its task if it has one."""


class Engine(Protocol):
    """threads: cores that each slot may use. `with engine:` ends every worker, also after an exception."""

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    @property
    def threads(self) -> int: ...

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *error: object) -> None: ...
