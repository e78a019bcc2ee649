"""What a task took: seconds by stage, and the memory of its worker."""

import contextlib
import gc
import os
import socket
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lora_export.contracts.fleet import RowOutcome, State, Task

_PEAK = "5"  # written to clear_refs: the high-water mark starts anew (proc(5))


@dataclass
class Clock:
    """The progress of a task: it keeps warnings for the driver, and adds up the seconds of each stage by its first
    word."""

    started: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _stage: str = "start"
    _since: float = field(default_factory=time.monotonic)

    def stage(self, title: str) -> None:
        self._end()
        self._stage = title.partition(":")[0]

    def detail(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def advance(self, done: int, total: int) -> None: ...

    def _end(self) -> None:
        at = time.monotonic()
        self.stages[self._stage] = self.stages.get(self._stage, 0.0) + at - self._since
        self._since = at

    def outcome(self, task: Task, state: State, **more: Any) -> RowOutcome:
        """Of the task as it is at this moment."""
        self._end()
        made = RowOutcome(
            name=task.planned.row.name,
            key=task.planned.key if task.kind == "row" else task.planned.base_key,
            state=state,
            kind=task.kind,
            seconds=round(time.monotonic() - self.started, 3),
            stages={name: round(seconds, 3) for name, seconds in self.stages.items()},
            memory_bytes=peak(),
            warnings=tuple(self.warnings),
            worker=f"{socket.gethostname()}, process {os.getpid()}",
        )
        return replace(made, **more)


def reset_peak() -> None:
    """Have the kernel forget the largest resident set so far, where it can: `peak` then speaks of one task."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_PEAK)


def peak() -> int:
    """The largest resident set of this process, in bytes."""
    from lora_export.merging import peak_rss

    return peak_rss()


@cache
def spare_imports() -> None:
    """Have no search for garbage visit what is there by now: half a million objects of torch, which last. Once in a
    process, and between two tasks: what comes later may have to be found."""
    gc.freeze()
